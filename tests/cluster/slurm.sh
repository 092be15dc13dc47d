#!/usr/bin/env bash
# A real SLURM cluster on this one machine, for the tests: no systemd, no accounting, imaginary nodes and GPUs.
#
#   tests/cluster/slurm.sh install   packages of the distribution (Debian or Ubuntu, as root), if they are missing
#   tests/cluster/slurm.sh up        start; prints the line that makes clients find it: export SLURM_CONF=...
#   tests/cluster/slurm.sh restart   stop and start the controller only (jobs go on)
#   tests/cluster/slurm.sh down      cancel everything, stop, remove
#
# CLUSTER_DIR  where everything lies  (default /tmp/ptqbench-cluster)
# CLUSTER_NODES, CLUSTER_GPUS, CLUSTER_CPUS, CLUSTER_MEM  what is claimed, whatever the machine has (2, 4, 16, 65536 MiB)
# Partitions: main (default, never preempted), spare (low priority, its jobs are requeued when main needs the nodes).
set -euo pipefail
DIR=${CLUSTER_DIR:-/tmp/ptqbench-cluster}
NODES=${CLUSTER_NODES:-2} GPUS=${CLUSTER_GPUS:-4} CPUS=${CLUSTER_CPUS:-16} MEM=${CLUSTER_MEM:-65536}
export SLURM_CONF=$DIR/slurm.conf LC_ALL=C.UTF-8
PATH=$PATH:/usr/sbin:/sbin
say() { echo "slurm.sh: $*" >&2; }

install_packages() {
  local missing=()
  command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
  command -v munged >/dev/null || missing+=(munge)
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "missing ${missing[*]}: install them as root, on Debian or Ubuntu"; exit 3; }
  local guard=/usr/sbin/policy-rc.d made=0        # the packages must not start services of their own
  [ -e $guard ] || { printf '#!/bin/sh\nexit 101\n' >$guard; chmod +x $guard; made=1; }
  apt-get update -qq || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || { say "apt-get failed"; exit 3; }
  [ $made = 0 ] || rm -f $guard
}

running() { local pid; pid=$(cat "$1" 2>/dev/null) && [ -d "/proc/$pid" ]; }
until_ok() { local tries=$1; shift; for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done; return 1; }

free_ports() {  # a block of free ports below the ephemeral range, at random: two clusters may start at the same moment
  python3 - "$((NODES + 1))" <<'PY'
import random, socket, sys
for first in random.SystemRandom().sample(range(21000, 32000, 40), 275):
    held = []
    try:
        for port in range(first, first + int(sys.argv[1])):
            held.append(socket.create_server(("127.0.0.1", port)))
    except OSError:
        continue
    finally:
        for server in held:
            server.close()
    print(first)
    break
PY
}

configure() {
  local port; port=$(cat "$DIR/port" 2>/dev/null) || { port=$(free_ports); echo "$port" >"$DIR/port"; }
  cat >"$SLURM_CONF" <<CONF
ClusterName=ptqtest
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.sock,cred_expire=6
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
MailProg=$DIR/mail
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
MinJobAge=3600
MaxArraySize=${CLUSTER_ARRAY:-1001}
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node[1-$NODES] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + NODES))] CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=24:00:00 DefaultTime=30 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=spare Nodes=ALL MaxTime=24:00:00 DefaultTime=30 PriorityTier=1 PreemptMode=REQUEUE State=UP
CONF
  printf '#!/bin/sh\necho "$@" >>%s/log/mail\n' "$DIR" >"$DIR/mail"; chmod +x "$DIR/mail"   # sends nothing, keeps the subjects
  local files=""
  for gpu in $(seq 0 $((GPUS - 1))); do
    [ -e "$DIR/dev/gpu$gpu" ] || mknod "$DIR/dev/gpu$gpu" c 1 3   # the null device under another name
  done
  echo "NodeName=node[1-$NODES] AutoDetect=off Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
}

start_munge() {
  running "$DIR/munged.pid" && return
  [ -s "$DIR/munge.key" ] || { head -c 1024 /dev/urandom >"$DIR/munge.key"; chmod 0400 "$DIR/munge.key"; }
  rm -f "$DIR/munge.sock" "$DIR/munge.sock.lock" "$DIR/munged.pid"
  munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.sock" --pid-file="$DIR/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed" 2>/dev/null
  until_ok 50 munge -n -S "$DIR/munge.sock" || { say "munged does not answer"; exit 1; }
}

start_controller() {
  running "$DIR/slurmctld.pid" || { rm -f "$DIR/slurmctld.pid"; setsid slurmctld -f "$SLURM_CONF" >>"$DIR/log/out" 2>&1 </dev/null; }
  until_ok 150 scontrol ping || { say "slurmctld does not answer"; tail -5 "$DIR/log/slurmctld.log" >&2; exit 1; }
}

stop() { local pid; pid=$(cat "$1" 2>/dev/null) || return 0; kill "$pid" 2>/dev/null || return 0
         for _ in $(seq 50); do [ -d "/proc/$pid" ] || return 0; sleep 0.1; done; kill -9 "$pid" 2>/dev/null || true; }

up() {
  [ "$(id -u)" = 0 ] || { say "SLURM's daemons start jobs for others: run as root"; exit 3; }
  mkdir -p "$DIR" "$DIR/log" "$DIR/state" "$DIR/dev"; chmod 755 "$DIR"
  configure; start_munge; start_controller
  for node in $(seq "$NODES"); do
    mkdir -p "$DIR/spool/node$node"
    running "$DIR/slurmd-node$node.pid" || setsid slurmd -f "$SLURM_CONF" -N "node$node" >>"$DIR/log/out" 2>&1 </dev/null
  done
  ready() { [ "$(sinfo -h -N -p main -o %t | grep -cE 'idle|mix|alloc')" = "$NODES" ]; }
  until_ok 150 ready || { say "the nodes do not come up"; sinfo -N -l >&2; exit 1; }
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
  [ -d "$DIR" ] || return 0
  timeout 10 scancel --user=root >/dev/null 2>&1 || true
  for pid in "$DIR"/slurmd-*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do stop "$pid"; done
  rm -rf "$DIR"
}

case ${1:-} in
  install) install_packages ;;
  up) install_packages; up ;;
  restart) stop "$DIR/slurmctld.pid"; start_controller ;;
  down) down ;;
  *) sed -n '2,12p' "$0" >&2; exit 2 ;;
esac
