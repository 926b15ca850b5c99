# shellcheck shell=bash
# What the scripts of this folder share: they name resources, this file starts and ends their work (docs/slurm.md).
# It is sourced with $script set: the script, not the copy of it that sbatch runs.
set -euo pipefail

checkout=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
script=$(realpath "${script:?}")

say() {
    echo "$(date --iso-8601=seconds) $*"
}

die() {
    echo "error: $*" >&2
    exit 1
}

load_cluster() { # the environment file: what is the same for all jobs of a cluster
    local name=${MEGATRON_VL_CLUSTER:-a100_infiniband}
    local file=$checkout/slurm/env/$name.sh
    [ -r "$file" ] || die "MEGATRON_VL_CLUSTER=$name: $file is missing; it would be like its neighbours"
    python=$checkout/.venv/bin/python container=none image='' mounts=$checkout srun_options=()
    # shellcheck source=/dev/null
    source "$file"
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
    inside=() contained=()
    case $container in
        none) [ -x "$python" ] || die "$python is missing: run make environment, or set python or container in $file" ;;
        pyxis) contained=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
        apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image") ;;
        *) die "container=$container in $file: must be none, pyxis or apptainer" ;;
    esac
}

is_job() { # whether this is the copy that sbatch runs; in an interactive allocation the script submits, too
    [ "${0##*/}" = slurm_script ]
}

alone() { # alone MODULE OVERRIDES…: one process on one machine, no rank. Only srun starts pyxis's containers.
    if [ "$container" != pyxis ]; then
        "${inside[@]}" "$python" -m "$@"
        return
    fi
    local name value where=(--overlap --gres=none)
    if [ -z "${SLURM_JOB_ID:-}" ]; then # srun does not read what sbatch would
        where=()
        for name in account partition qos reservation; do
            value=SBATCH_${name^^}
            value=$(option "$name" | grep . || printf '%s' "${!value:-}")
            [ -z "$value" ] || where+=("--$name=$value")
        done
    fi
    # GPUs of the job's header beside --gres=none are an error to SLURM before 23.02.5; with a master it would be a rank.
    env -u SLURM_GPUS_PER_NODE -u MASTER_ADDR \
        srun --nodes=1 --ntasks=1 "${where[@]}" "${contained[@]}" "$python" -m "$@"
}

ranks() { # ranks OPTION MODULE OVERRIDES…: a process for each rank, which srun's variables tell which it is
    local option=$1
    shift
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_NTASKS" --kill-on-bad-exit=1 --wait=600 \
        --open-mode=append "$option" \
        "${srun_options[@]}" "${contained[@]}" "${inside[@]}" "$python" -m "$@"
}

split_arguments() { # those with two dashes are sbatch's, the others Hydra's
    options=() overrides=() swept=()
    local argument
    for argument in "$@"; do
        case $argument in
            --*) options+=("$argument") ;;
            -*) die "$argument: write options for sbatch as --name=value, overrides as field=value" ;;
            *) overrides+=("$argument") ;;
        esac
    done
}

option() { # option NAME: its value for sbatch, the last one of the script's header and the arguments
    { sed -n 's/^#SBATCH //p' "$script" && printf '%s\n' "${options[@]}"; } | sed -n "s/^--$1=//p" | tail -n 1
}

sweep_line() { # sweep_line TASK: sets $swept, what the file SWEEP has for a task of the array
    local line name
    line=$(sed -n "$(($1 + 1))p" "$SWEEP")
    [ -n "$line" ] || die "SWEEP=$SWEEP has no line $(($1 + 1)), for task $1 of the array"
    name=$(basename "$SWEEP")
    read -ra swept <<< "$line"
    swept=("run.dir=runs/${name%.*}/$1" "${swept[@]}")
}

check() { # check NUM_RANKS OVERRIDES…: what training would refuse
    local num_ranks=$1
    shift
    alone launch.check "$@" "run.num_processes=$num_ranks"
}

check_all() { # before anything is asked for, the run or every run of the sweep
    local num_ranks task
    num_ranks=$(($(option nodes) * $(option ntasks-per-node)))
    if [ -z "${SWEEP:-}" ]; then
        check "$num_ranks" "${overrides[@]}"
        return
    fi
    local -i num_tasks
    num_tasks=$(grep -c . "$SWEEP") || die "SWEEP=$SWEEP must be a file with a line of overrides for each run"
    for ((task = 0; task < num_tasks; task++)); do
        sweep_line "$task"
        check "$num_ranks" "${overrides[@]}" "${swept[@]}"
    done
    [ -n "$(option array)" ] || options+=("--array=0-$((num_tasks - 1))")
}

job_begins() { # what a job needs before its first srun
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # one number may mean the whole array
    job=${job:-$SLURM_JOB_ID}
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export SLURM_EXPORT_ENV=ALL # for srun, whatever sbatch was told: ranks need the cluster's variables
    logs=logs/$SLURM_JOB_NAME-$job
    mkdir -p "$logs"
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST" \
        "(${MEGATRON_VL_CLUSTER:-a100_infiniband}); their logs: $PWD/$logs"
}

pass_on() { # pass_on SIGNAL: the ranks save and end. SLURM sends TERM to them too.
    interrupted=yes
    say "SIG$1: the ranks save and end"
    if [ "$1" != TERM ]; then
        scancel --signal="$1" "$job" || say "there are no ranks"
    elif [ "$(job_stands)" = "COMPLETING TimeLimit" ] && scontrol requeue "$job"; then
        requeued=yes # now, as SLURM kills this script, too, with ranks that take longer than KillWait
    fi
}

wait_for() { # wait_for PID: to its end, through all signals; sets $status
    interrupted=yes
    while [ -n "$interrupted" ]; do
        interrupted='' status=0
        wait "$1" || status=$?
    done
}

job_stands() { # the job's state and its reason; where SLURM does not answer for half a minute, RUNNING
    local try
    for try in 1 2 3; do
        squeue --noheader --jobs="$job" --format='%T %r' | grep . && return
        [ "$try" = 3 ] || sleep 15
    done
    echo RUNNING
}

slurm_ends_it() { # a cancelled job must not come back, and a preempted one does by itself
    local state reason
    read -r state reason <<< "$(job_stands)"
    [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]
}

requeue() { # the job starts anew, without the nodes in $bad
    [ -z "${requeued:-}" ] || exit 0
    if slurm_ends_it; then
        say "SLURM is ending the job: it is not requeued from here"
        exit 0
    fi
    trap '' TERM USR1 # the requeue ends this script and what it starts
    local excluded
    excluded=$(scontrol show job "$job" | sed -n 's/.* ExcNodeList=//p')
    scontrol requeue "$job"
    [ -n "${bad:-}" ] || exit 0
    say "excluding $bad"
    [ "$excluded" = "(null)" ] || bad=$excluded,$bad
    scontrol update "jobid=$job" "ExcNodeList=$bad" || die "could not exclude $bad: the job comes back on any node"
    exit 0
}

conclude() { # conclude OVERRIDES…: as the run's status says, never by a signal or an exit status
    local answer
    if ! answer=$(alone launch.requeue "$@"); then
        slurm_ends_it || die "cannot tell how the run stands; its ranks ended with status $status"
        answer="requeue: unless SLURM does"
    fi
    say "the ranks ended with status $status; $answer"
    case $answer in
        done:*) exit 0 ;;
        requeue:*) requeue ;;
        *) exit 1 ;;
    esac
}

check_failed() { # check_failed OVERRIDES…: what was well at an earlier start may be so again, such as an object store
    status=1
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit "$status"
    conclude "$@"
}

not_fit() { # of what the node check prints, the answer; libraries such as NCCL print, too
    tee -a /dev/stderr | tr -d '\r' | sed -n 's/^not fit: //p'
}

keep_sweep() { # sets $SWEEP to a copy, which tasks read whenever they come back
    local name kept
    name=$(basename "$SWEEP")
    kept=runs/${name%.*}/$name
    mkdir -p "$(dirname "$kept")"
    [ -e "$kept" ] || cp "$SWEEP" "$kept"
    cmp -s "$SWEEP" "$kept" ||
        die "SWEEP=$SWEEP has other lines than $kept, whose runs are there: give the file another name"
    export SWEEP=$kept
}

submit() { # submit OVERRIDES…; with the present environment, even where a site's default is none
    local name # but not with what an allocation around it says: it would be taken for the job's
    for name in "${!SLURM_@}"; do
        [ "$name" = SLURM_CONF ] || unset "$name"
    done
    exec sbatch --export=ALL "${options[@]}" "$script" "$@"
}

pretrain() { # pretrain EXPERIMENT ARGUMENTS…: under sbatch train, else check and submit
    split_arguments "$@"
    load_cluster
    if ! is_job; then
        check_all
        [ -z "${SWEEP:-}" ] || keep_sweep
        submit "${overrides[@]:1}" # the experiment is the script's
    fi
    [ -z "${SWEEP:-}" ] || sweep_line "${SLURM_ARRAY_TASK_ID:?SWEEP needs an array}"
    overrides+=("${swept[@]}")
    job_begins
    check "$SLURM_NTASKS" "${overrides[@]}" || check_failed "${overrides[@]}"
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    bad=$(ranks --unbuffered launch.node_check "${overrides[@]}" | not_fit) || { status=$? && conclude "${overrides[@]}"; }
    [ -z "$bad" ] || { status=0 && conclude "${overrides[@]}"; }
    ranks "--output=$logs/$SLURM_JOB_NAME-$job-%N-%t.log" launch.pretrain "${overrides[@]}" &
    wait_for $!
    conclude "${overrides[@]}"
}

evaluate() { # evaluate ARGUMENTS…: under sbatch measure a checkpoint, else check and submit
    split_arguments "$@"
    load_cluster
    if ! is_job; then
        alone launch.evaluate "${overrides[@]}" mode=check \
            "run.num_processes=$(($(option nodes) * $(option ntasks-per-node)))"
        submit "${overrides[@]}"
    fi
    job_begins
    alone launch.evaluate "${overrides[@]}" mode=check "run.num_processes=$SLURM_NTASKS"
    ranks "--output=$logs/$SLURM_JOB_NAME-$job-%N-%t.log" launch.evaluate "${overrides[@]}"
}

plan() { # plan OVERRIDES…: before GPUs are taken, what training would do with them, ranks of it, and what it refuses
    split_arguments "$@"
    load_cluster
    is_job || submit "${overrides[@]}"
    alone launch.plan "${overrides[@]}"
    alone launch.plan "${overrides[@]}" verify=true
    alone launch.check "${overrides[@]}"
}
