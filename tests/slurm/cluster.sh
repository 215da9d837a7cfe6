#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one machine, for tests.
#
#   cluster.sh start DIR [NODES]   bring it up (idempotent); returns when all nodes are idle
#   cluster.sh env DIR             print what a client's environment needs (eval it)
#   cluster.sh stop DIR            end everything that start started, and nothing else
#   cluster.sh run [NODES] -- CMD  temporary cluster around one command
#   cluster.sh crash DIR NODE      power-cut a node: every process on it dies at once
#   cluster.sh boot DIR NODE       start a crashed node again
#   cluster.sh at DIR NODE CMD...  run a command inside a node
#
# Each node is a set of Linux namespaces (net, pid, uts, mount) with its own address, hostname,
# loopback and process table, in which the distribution's slurmd runs; the machine itself is the
# head node, where slurmctld, sbatch and srun run. All nodes see the same files. Outside DIR
# there is only one veth interface, which the kernel removes when the cluster's last process has
# ended, and (where cgroup v1 is to be had) one cgroup, /sys/fs/cgroup/freezer/slurmN. Every
# process descends from one supervisor and the kernel kills them when it dies (PDEATHSIG), so even
# a kill -9 of the supervisor leaves no process. Clusters can run side by side, each in its DIR.
#
# Needs root and: apt-get install -y --no-install-recommends slurm-wlm munge iproute2
# Settings: SLURM_TEST_CPUS (8) and SLURM_TEST_GPUS (2, fake) per node; SLURM_TEST_CONF (lines
# added to slurm.conf); SLURM_TEST_OWNER (a pid: the cluster ends once that process has);
# SLURM_TEST_PROCTRACK (cgroup, which falls back to linuxproc).
# shellcheck disable=SC1091  # ./cluster is written by `configure`
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
self=$(readlink -f "$0")
freezer=/sys/fs/cgroup/freezer

die() { echo "cluster.sh: $*" >&2; exit 1; }
until_ok() {                                   # until_ok SECONDS CMD...: poll until CMD succeeds
    local end=$((SECONDS + $1)); shift
    until "$@"; do ((SECONDS < end)) || return 1; sleep 0.1; done
}
start_time() {                                 # of a process, in ticks since the machine started: field 22
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra fields <<<"${stat##*) }"
    echo "${fields[19]}"
}
record() { echo "$2 $(start_time "$2")" >"$1"; }            # record FILE PID
alive() {                                                   # is the process in FILE still that one?
    local pid start; read -r pid start 2>/dev/null <"$1" && [[ -n $start && $(start_time "$pid") == "$start" ]]
}

configure() {                                  # configure NODES: write DIR/slurm.conf and the like
    local n=$1 i id net proctrack=linuxproc cpus=${SLURM_TEST_CPUS:-8} gpus=${SLURM_TEST_GPUS:-2}
    ((${#dir} <= 64)) || die "$dir: too long a path for Unix sockets (64 characters at most)"
    for id in $(shuf -i 1-250); do [[ -e /sys/class/net/slurm$id ]] || break; done
    net=198.18.$id                             # 198.18.0.0/15 is reserved for tests of networks
    mkdir -p state spool log munge run dev; chmod 755 . munge
    printf '%s\n' "id=$id" "net=$net" "n=$n" >cluster
    { echo "127.0.0.1 localhost"; echo "$net.254 head"
      for ((i = 1; i <= n; i++)); do echo "$net.$i node$i"; done; } >hosts
    (umask 077; head -c 64 /dev/urandom >munge/key)
    if [[ ${SLURM_TEST_PROCTRACK:-cgroup} == cgroup ]] && mkdir -p "$freezer/slurm$id" 2>/dev/null; then
        proctrack=cgroup; printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no >cgroup.conf
    fi
    : >gres.conf
    for ((i = 0; i < gpus; i++)); do           # null devices stand for /dev/nvidia0, 1, ...
        rm -f "dev/gpu$i"; mknod "dev/gpu$i" c 1 3 2>/dev/null || : >"dev/gpu$i"; echo "Name=gpu File=$dir/dev/gpu$i" >>gres.conf
    done
    cat >slurm.conf <<CONF
ClusterName=test
SlurmctldHost=head($net.254)
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.slurm
SlurmdPidFile=$dir/run/%n.slurm
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/$proctrack
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# Short times, so that tests are quick, and long ones for a slow machine. SLURM's own: 3, 60, 2, 30; 30; 300; 300.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
KillWait=120
SlurmdTimeout=30
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus RealMemory=4000 State=UNKNOWN$( ((gpus == 0)) || echo " Gres=gpu:$gpus")
$(for ((i = 1; i <= n; i++)); do echo "NodeName=node$i NodeAddr=$net.$i"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=graceless Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
${SLURM_TEST_CONF:-}
CONF
}

child() { exec setpriv --pdeathsig KILL -- "$@"; }   # run with &: dies with the supervisor
in_net() { nsenter --net="/proc/$1/ns/net" -- "${@:2}"; }   # in_net PID CMD...
own_net() { [[ $(readlink "/proc/$1/ns/net") != "$(readlink /proc/self/ns/net)" ]]; }

boot() {                                       # boot NODE (in the supervisor)
    local node=$1 i=${1#node} pid
    child unshare --net --pid --uts --mount --mount-proc --fork --kill-child \
        "$self" _node "$dir" "$node" >>"log/$node.out" 2>&1 & pid=$!
    record "run/$node" $pid
    until_ok 10 own_net $pid                   # $pid is unshare itself: it owns the namespace
    in_net "$switch" ip link del "n$id-$i" 2>/dev/null || true
    ip link add "n$id-$i" type veth peer name eth0 netns $pid
    ip link set "n$id-$i" netns "$switch"
    in_net "$switch" ip link set "n$id-$i" master br0 up
    in_net $pid ip link set lo up
    in_net $pid ip addr add "$net.$i/24" dev eth0
    in_net $pid ip link set eth0 up
    : >"run/$node.net"
}
named() { echo "$1" >/proc/sys/kernel/hostname; mount --bind "$dir/hosts" /etc/hosts; }
node_main() {                                  # process 1 of a node
    named "$1"; mkdir -p "spool/$1"
    if [[ -e cgroup.conf ]]; then              # a part of the freezer hierarchy for this node alone
        . ./cluster; mkdir -p "$freezer/slurm$id/$1"; mount --bind "$freezer/slurm$id/$1" $freezer
    fi
    until [[ -e run/$1.net ]]; do sleep 0.05; done; rm "run/$1.net"
    slurmd -D -N "$1" &
    while :; do wait -n || sleep 1; done       # reap; the node outlives its slurmd
}
no_cgroup() { find "$freezer/slurm$id" -depth -type d -exec rmdir {} + 2>/dev/null; [[ ! -d $freezer/slurm$id ]]; }
rm_cgroup() { . ./cluster; until_ok 5 no_cgroup || true; }  # the processes in it may still be exiting
supervise() {                                  # parent of everything; SIGTERM ends it
    trap 'exit 0' TERM INT HUP
    trap 'trap - EXIT; kill -KILL $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -f run/*; rm_cgroup' EXIT
    . ./cluster
    child unshare --net sleep infinity & switch=$!
    until_ok 5 own_net $switch
    ip link add "slurm$id" type veth peer name head netns $switch
    ip addr add "$net.254/24" dev "slurm$id"
    ip link set "slurm$id" up
    in_net $switch sh -ec 'ip link add br0 type bridge; ip link set head master br0 up; ip link set br0 up'
    child munged --foreground --force --num-threads=2 --key-file="$dir/munge/key" \
        --socket="$dir/munge/socket" --seed-file="$dir/munge/seed" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" >log/munged.out 2>&1 &
    until_ok 5 test -S munge/socket
    child unshare --uts --mount "$self" _as "$dir" head slurmctld -D >log/slurmctld.out 2>&1 & ctld=$!
    for ((i = 1; i <= n; i++)); do boot "node$i"; done
    : >run/ready
    while kill -0 $ctld 2>/dev/null && [[ -z ${SLURM_TEST_OWNER:-} || -e /proc/$SLURM_TEST_OWNER ]]; do
        for request in run/boot.*; do
            [[ -e $request ]] || continue
            alive "run/${request#run/boot.}" || boot "${request#run/boot.}"
            rm "$request"
        done
        sleep 0.2 & wait $! || true            # a signal interrupts wait, not a foreground sleep
    done
}

running() { alive run/supervisor; }
ready() { [[ -e run/ready ]] || ! running; }
stopped() { ! running; }
settled() { ! running || [[ $(sinfo -h -N -p main -t idle,mixed,alloc,comp -o %N 2>/dev/null | wc -l) -ge $1 ]]; }
failed() { stop; tail -n 5 log/*.out >&2; die "$1; the logs are in $dir/log"; }
start() {
    local c n=${1:-2}
    for c in slurmctld slurmd munged sbatch ip unshare nsenter setpriv; do
        command -v $c >/dev/null || die "$c is missing: apt-get install -y slurm-wlm munge iproute2"
    done
    [[ $EUID == 0 ]] || die "needs root"
    exec 9>lock; flock 9                       # two at once: the second finds the first one's cluster
    if ! running; then
        rm -rf state spool run munge log cgroup.conf
        configure "$n"
        setsid "$self" _supervise "$dir" >log/supervisor.out 2>&1 </dev/null 9>&- &
        record run/supervisor $!
        until_ok 20 ready && [[ -e run/ready ]] || failed "did not start"
    fi
    if ! until_ok 30 settled "$n" || ! running; then failed "not all nodes became idle"; fi
}
stop() {
    [[ -e cluster ]] || return 0
    local pid jobs
    if running; then
        jobs=$(timeout 5 squeue -h -o %A 2>/dev/null) || jobs=
        if [[ -n $jobs ]]; then timeout 5 xargs scancel <<<"$jobs"; sleep 0.5; fi   # or a waiting srun would hang
        read -r pid _ <run/supervisor
        kill -TERM "$pid"
        until_ok 10 stopped || kill -KILL "$pid"
    fi
    rm_cgroup
}
at() {                                         # the node's process 1 is the one child of unshare
    local pid; alive "run/$1" || die "$1 is not up"
    read -r pid _ <"run/$1"; pid=$(<"/proc/$pid/task/$pid/children")
    exec nsenter --target "${pid%% *}" --net --pid --uts --mount --wdns="$here" -- "${@:2}"
}

cmd=${1:-}; shift || true
case $cmd in
    run)
        n=2; [[ ${1:-} == -- ]] || { n=$1; shift; }; shift
        tmp=$(mktemp -d -t slurm.XXXXXX)
        trap '"$self" stop "$tmp"; rm -rf "$tmp"' EXIT
        trap 'exit 143' TERM HUP; trap 'exit 130' INT
        SLURM_TEST_OWNER=$$ "$self" start "$tmp" "$n"
        SLURM_CONF=$tmp/slurm.conf "$@"; exit;;
    start|stop|env|crash|boot|at|_supervise|_node|_as) [[ -n ${1:-} ]] || die "$cmd: which directory?";;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$self"; exit 2;;
esac
[[ $cmd != start ]] || mkdir -p "$1"
dir=$(readlink -e "$1") || die "$1: no such directory"
here=$PWD; cd "$dir"; shift
export SLURM_CONF=$dir/slurm.conf
case $cmd in
    start) start "$@";;
    stop) stop;;
    env) echo "export SLURM_CONF=$SLURM_CONF";;
    crash) alive "run/$1" || die "$1 is not up"; read -r pid _ <"run/$1"; kill -KILL "$pid";;
    boot) running || die "no cluster runs in $dir"; : >"run/boot.$1"; until_ok 10 test ! -e "run/boot.$1";;
    at) at "$@";;
    _supervise) supervise;;
    _node) node_main "$1";;
    _as) named "$1"; exec "${@:2}";;
esac
