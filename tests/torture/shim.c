/* Counts the file operations below a folder and kills the process, or lets an operation fail, at one of them.

   Loaded with LD_PRELOAD, idle until armed: what Python, safetensors (Rust) and Arrow (C++) write all passes here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, BEFORE, WITHIN, AFTER, FAIL_ONCE, FAIL_ON };
enum { NAMES, SPACE }; /* what an operation needs: a full disk refuses those that need space */

static char below[PATH_MAX];
static size_t length;
static long at = -1;
static int mode, code, trace = -1;
static atomic_long count;

void torture_arm(const char *folder, long operation, int how, int error, int log) {
  strncpy(below, folder, sizeof below - 1);
  at = operation, mode = how, code = error, trace = log, count = 0, length = strlen(below);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static const char *name_of(int fd, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, buffer, PATH_MAX - 1);
  buffer[n < 0 ? 0 : n] = 0;
  return buffer;
}

/* 0: go on, 1: this is the operation, -1: fail now with errno */
static int hit(const char *operation, const char *path, int needs) {
  if (!length || !path || strncmp(path, below, length)) return 0;
  int saved = errno;
  long n = ++count;
  if (trace >= 0) dprintf(trace, "%s\t%s\n", operation, path + length);
  int full = code == ENOSPC || code == EDQUOT;
  if (mode >= FAIL_ONCE && (mode == FAIL_ON ? n >= at : n == at) && (needs == SPACE || !full)) { errno = code; return -1; }
  errno = saved;
  if (n != at || mode == COUNT || mode >= FAIL_ONCE) return 0;
  if (mode == BEFORE) die();
  return 1;
}

#define REAL(name, ...) static int (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define REALS(name, ...) static ssize_t (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define ENDING(struck, call) do { if (struck < 0) return -1; int r = call; if (struck) die(); return r; } while (0)

#define OPEN(name) int name(const char *path, int flags, ...) { \
  REAL(name, const char *, int, ...); va_list more; va_start(more, flags); int bits = va_arg(more, int); va_end(more); \
  int struck = flags & (O_WRONLY | O_RDWR | O_CREAT) ? hit("open", path, flags & O_CREAT ? SPACE : NAMES) : 0; \
  ENDING(struck, real(path, flags, bits)); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int at_fd, const char *path, int flags, ...) { \
  REAL(name, int, const char *, int, ...); va_list more; va_start(more, flags); int bits = va_arg(more, int); va_end(more); \
  int struck = flags & (O_WRONLY | O_RDWR | O_CREAT) ? hit("open", path, flags & O_CREAT ? SPACE : NAMES) : 0; \
  ENDING(struck, real(at_fd, path, flags, bits)); }
OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) {
  REALS(write, int, const void *, size_t);
  char buffer[PATH_MAX];
  int struck = length && fd > 2 && fd != trace ? hit("write", name_of(fd, buffer), SPACE) : 0;
  if (struck < 0) return -1;
  ssize_t done = real(fd, data, struck && mode == WITHIN ? n / 2 : n);
  if (struck) die();
  return done;
}
#define PWRITE(name, type) ssize_t name(int fd, const void *data, size_t n, type offset) { \
  REALS(name, int, const void *, size_t, type); char buffer[PATH_MAX]; \
  int struck = length ? hit("write", name_of(fd, buffer), SPACE) : 0; if (struck < 0) return -1; \
  ssize_t done = real(fd, data, struck && mode == WITHIN ? n / 2 : n, offset); if (struck) die(); return done; }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REALS(writev, int, const struct iovec *, int);
  char buffer[PATH_MAX];
  int struck = length ? hit("write", name_of(fd, buffer), SPACE) : 0;
  if (struck < 0) return -1;
  ssize_t done = real(fd, parts, struck && mode == WITHIN && n > 1 ? n / 2 : n);
  if (struck) die();
  return done;
}

#define ON_FD(name) int name(int fd) { REAL(name, int); char buffer[PATH_MAX]; \
  int struck = length ? hit(#name, name_of(fd, buffer), SPACE) : 0; ENDING(struck, real(fd)); }
ON_FD(fsync) ON_FD(fdatasync)
#define CUT(name, type) int name(int fd, type n) { REAL(name, int, type); char buffer[PATH_MAX]; \
  int struck = length ? hit("truncate", name_of(fd, buffer), SPACE) : 0; ENDING(struck, real(fd, n)); }
CUT(ftruncate, off_t) CUT(ftruncate64, off64_t)

#define ON_PATH(name, needs) int name(const char *path) { REAL(name, const char *); \
  int struck = hit(#name, path, needs); ENDING(struck, real(path)); }
ON_PATH(unlink, NAMES) ON_PATH(rmdir, NAMES)
int unlinkat(int fd, const char *path, int flags) {
  REAL(unlinkat, int, const char *, int); int struck = hit("unlink", path, NAMES); ENDING(struck, real(fd, path, flags)); }
int mkdir(const char *path, mode_t bits) {
  REAL(mkdir, const char *, mode_t); int struck = hit("mkdir", path, SPACE); ENDING(struck, real(path, bits)); }
int mkdirat(int fd, const char *path, mode_t bits) {
  REAL(mkdirat, int, const char *, mode_t); int struck = hit("mkdir", path, SPACE); ENDING(struck, real(fd, path, bits)); }
int link(const char *from, const char *to) {
  REAL(link, const char *, const char *); int struck = hit("link", to, SPACE); ENDING(struck, real(from, to)); }
int rename(const char *from, const char *to) {
  REAL(rename, const char *, const char *); int struck = hit("rename", to, NAMES); ENDING(struck, real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) {
  REAL(renameat, int, const char *, int, const char *); int struck = hit("rename", to, NAMES); ENDING(struck, real(a, from, b, to)); }
