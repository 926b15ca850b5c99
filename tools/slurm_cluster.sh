#!/usr/bin/env bash
# A SLURM of two nodes and a spare one on this one machine, from Debian's packages, to try the scripts in slurm/ with.
#
#   tools/slurm_cluster.sh up DIR         all of it in DIR; then: export SLURM_CONF=DIR/slurm.conf
#   tools/slurm_cluster.sh node DIR n3    starts a node: the spare one, or one that was killed
#   tools/slurm_cluster.sh kill DIR n2    a node loses power: every process on it ends at once
#   tools/slurm_cluster.sh down DIR
#
# Needs root. Nodes n1, n2 and n3, the spare one, have two CPUs each, whatever the machine has. A node is a process namespace with a host
# name and an /etc/hosts of its own, so nothing of the machine is changed, and ending its first process ends all of it.
set -euo pipefail

NODES=(n1 n2)
SPARE=n3
CPUS=2
WAIT_SECONDS=30

die() {
    echo "error: $*" >&2
    exit 1
}

write_configuration() {
    local port=$1
    mkdir -p "$dir"/{state,log}
    # --force: munged would refuse a folder that only root may enter
    install -d -m 0755 "$dir/munge"
    [ -e "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom > "$dir/munge/key")
    { cat /etc/hosts && echo "127.0.0.1 ${NODES[*]} $SPARE"; } > "$dir/hosts"
    cat > "$dir/cgroup.conf" <<- END
		CgroupPlugin=cgroup/v1
		CgroupAutomount=no
	END
    cat > "$dir/slurm.conf" <<- END
		ClusterName=one_machine
		SlurmctldHost=$(hostname -s)(127.0.0.1)
		SlurmctldPort=$port
		CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
		SlurmUser=root
		FirstJobId=$((1000 + RANDOM % 8000))
		AuthType=auth/munge
		AuthInfo=socket=$dir/munge/socket
		CredType=cred/munge
		StateSaveLocation=$dir/state
		SlurmdSpoolDir=$dir/spool-%n
		SlurmctldPidFile=$dir/slurmctld.pid
		SlurmdPidFile=$dir/slurmd-%n.pid
		SlurmctldLogFile=$dir/log/slurmctld.log
		SlurmdLogFile=$dir/log/slurmd-%n.log
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		JobAcctGatherType=jobacct_gather/none
		AccountingStorageType=accounting_storage/none
		SwitchType=switch/none
		MpiDefault=none
		SelectType=select/cons_tres
		SelectTypeParameters=CR_Core
		SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
		SlurmdParameters=config_overrides
		EnforcePartLimits=ALL
		ReturnToService=2
		SlurmdTimeout=10
		KillWait=60
		PreemptType=preempt/partition_prio
		PreemptMode=REQUEUE
		NodeName=n1 NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$CPUS RealMemory=4000
		NodeName=n2 NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$CPUS RealMemory=4000
		NodeName=n3 NodeAddr=127.0.0.1 Port=$((port + 3)) CPUs=$CPUS RealMemory=4000
		PartitionName=work Nodes=n1,n2,n3 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
		PartitionName=urgent Nodes=n1,n2,n3 MaxTime=60 PriorityTier=2
	END
}

free_ports() { # the first of four that nobody listens at
    local port=$((30000 + RANDOM % 2700))
    while for _ in 0 1 2 3; do (: < "/dev/tcp/127.0.0.1/$((port + _))") 2> /dev/null && break; done; do
        port=$((port + 4))
    done
    echo "$port"
}

start_node() {
    local node=$1
    mkdir -p "$dir/spool-$node"
    # shellcheck disable=SC2016  # expanded inside of the namespaces
    setsid unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c '
        mount --bind "$1/hosts" /etc/hosts
        hostname "$2"
        exec slurmd -D -f "$1/slurm.conf" -N "$2"
    ' node "$dir" "$node" > "$dir/log/$node.log" 2>&1 < /dev/null &
    echo $! > "$dir/$node.pid"
}

end() { # the process whose id is in a file, and wait for it
    local file=$1 signal=$2 pid
    [ -e "$file" ] || return 0
    pid=$(< "$file")
    kill -s "$signal" "$pid" 2> /dev/null || true
    for _ in $(seq $((WAIT_SECONDS * 10))); do
        kill -0 "$pid" 2> /dev/null || break
        sleep 0.1
    done
    rm -f "$file"
}

wait_for_nodes() {
    for _ in $(seq $((WAIT_SECONDS * 5))); do
        [ "$(sinfo --noheader --partition=work --states=idle --format=%D 2> /dev/null)" = "${#NODES[@]}" ] && return
        sleep 0.2
    done
    tail -n 20 "$dir"/log/*.log >&2
    die "the nodes did not become idle within $WAIT_SECONDS s; the logs are in $dir/log"
}

up() {
    [ "$(id -u)" = 0 ] || die "only root can start nodes with host names of their own"
    for program in slurmctld slurmd munged sbatch unshare; do
        command -v "$program" > /dev/null \
            || die "$program is missing: apt-get install slurmctld slurmd slurm-client munge util-linux"
    done
    write_configuration "$(free_ports)"
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=2 2> "$dir/munge/warnings"
    setsid slurmctld -D -f "$dir/slurm.conf" > "$dir/log/ctld.log" 2>&1 < /dev/null &
    echo $! > "$dir/ctld.pid"
    for node in "${NODES[@]}"; do start_node "$node"; done
    wait_for_nodes
}

down() {
    for node in "${NODES[@]}" "$SPARE"; do end "$dir/$node.pid" KILL; done
    end "$dir/ctld.pid" TERM
    end "$dir/munge/pid" TERM
}

[ $# -ge 2 ] || die "usage: $0 up|down DIR, or $0 node|kill DIR NODE"
mkdir -p "$2"
dir=$(realpath "$2")
export SLURM_CONF=$dir/slurm.conf
case $1 in
    up) up ;;
    node) start_node "$3" ;;
    kill) end "$dir/$3.pid" KILL ;;
    down) down ;;
    *) die "$1 is none of up, down, node, kill" ;;
esac
