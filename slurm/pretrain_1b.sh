#!/usr/bin/env bash
#SBATCH --job-name=pretrain_1b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# The paper's three stages, one after the other, on 16 x 8 GPUs; the job comes back until they are done (docs/slurm.md).
#
#   slurm/pretrain_1b.sh [--option-of-sbatch=value …] checkpoint.initial=DIR data.root=DIR [field=value …]
#
# checks what training needs, then submits itself; `sbatch slurm/pretrain_1b.sh field=value …` checks in the job.
script=$0 # unless sbatch has made a copy of it
[ "${0##*/}" != slurm_script ] || script=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/ .*//;p;q}')
common=$(dirname "$script")/common.sh
[ -r "$common" ] || common=$SLURM_SUBMIT_DIR/slurm/common.sh
[ -r "$common" ] || { echo "error: $common is missing: submit from the checkout, by the path of this script" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source "$common"

pretrain experiment=paper_1b "$@"
