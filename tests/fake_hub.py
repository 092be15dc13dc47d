"""The hub without the hub: caches in its layout, written by hand, and a server that answers as it does."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow
from pyarrow import parquet


def commit(number: int) -> str:
    """A commit, 40 hexadecimal digits."""
    return hashlib.sha1(str(number).encode()).hexdigest()


def table(**columns: list[Any]) -> bytes:
    """A Parquet file."""
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    """A file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(**configurations: dict[str, str]) -> bytes:
    """The ``README.md`` of a data set: configuration -> split -> file."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configurations.items()
    ]
    return f"---\nconfigs: {json.dumps(listed)}\n---\n".encode()


def write_cache(
    cache: Path,
    repository: str,
    at: str,
    files: dict[str, bytes],
    reference: str | None = "main",
    kind: str = "dataset",
) -> Path:
    """Put a snapshot into a hub cache as the library lays it out: blobs, links to them, and the reference.

    Args:
        cache: The hub cache.
        repository: ``ORGANISATION/NAME``.
        at: The commit.
        files: Path in the repository -> content.
        reference: Branch that names the commit from now on; None for none.
        kind: ``dataset`` or ``model``.

    Returns:
        The snapshot.
    """
    home = cache / f"{kind}s--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / at
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if reference is not None:
        place = home / "refs" / reference
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(at)
    return snapshot


class FakeHub:
    """Repositories that a server shows as the hub does; ``asked`` lists the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def add(self, kind: str, repository: str, at: str, files: dict[str, bytes], branch: str = "main") -> None:
        """Publish a commit and let a branch name it; ``kind`` is ``models`` or ``datasets``."""
        known = self.repositories.setdefault(f"{kind}/{repository}", {"branches": {}, "commits": {}})
        known["branches"][branch] = at
        known["commits"][at] = files

    def find(self, prefix: str, path: str) -> tuple[dict[str, Any], str, str] | None:
        """Split a path below ``prefix``: repository, the words after its name, and the name."""
        for name, known in self.repositories.items():
            shown = name.removeprefix("models/") if not prefix else name
            if path.startswith(f"{prefix}{shown}/"):
                return known, path.removeprefix(f"{prefix}{shown}/"), name.partition("/")[2]
        return None

    def answer(self, path: str) -> tuple[bytes, str | None] | None:
        """Content of a path and, for a file, its commit; None if there is no such thing."""
        found = self.find("/api/", path) or self.find("/", path) or self.find("", path.lstrip("/"))
        if found is None:
            return None
        known, rest, name = found
        what, _, rest = rest.partition("/")
        for named, at in [*known["branches"].items(), *((at, at) for at in known["commits"])]:
            files = known["commits"][at]
            if what == "revision" and rest == named:
                return json.dumps({"id": name, "sha": at, "siblings": [{"rfilename": f} for f in files]}).encode(), None
            if what == "tree" and rest == named:
                return json.dumps([_entry(path, content) for path, content in files.items()]).encode(), None
            if what == "resolve" and rest.removeprefix(f"{named}/") in files and rest.startswith(named):
                return files[rest.removeprefix(f"{named}/")], at
        return None


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub on this machine while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(path)
            found = hub.answer(path)
            content, at = found or (b"{}", None)
            self.send_response(200 if found else 404)
            if found is None:
                self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
            if at is not None:
                self.send_header("X-Repo-Commit", at)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
