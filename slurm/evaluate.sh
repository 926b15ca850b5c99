#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --output=%x-%j.log
# Benchmarks with a checkpoint on the 8 GPUs of a node; docs/evaluation.md lists them.
#
#   slurm/evaluate.sh [--option-of-sbatch=value …] checkpoint=DIR evaluation=paper evaluation.root=DIR [field=value …]
#
# checks what that needs, then submits itself; `sbatch slurm/evaluate.sh field=value …` checks in the job.
script=$0 # unless sbatch has made a copy of it
[ "${0##*/}" != slurm_script ] || script=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/ .*//;p;q}')
common=$(dirname "$script")/common.sh
[ -r "$common" ] || common=$SLURM_SUBMIT_DIR/slurm/common.sh
[ -r "$common" ] || { echo "error: $common is missing: submit from the checkout, by the path of this script" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source "$common"

evaluate "$@"
