#!/usr/bin/env bash
#SBATCH --job-name=plan
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=2:00:00
#SBATCH --output=%x-%j.log
# Without a GPU: the plan of a run, ranks of it built and run without data, and what training would refuse.
#
#   slurm/plan.sh [--option-of-sbatch=value …] experiment=paper_7b run.num_processes=512 checkpoint.initial=DIR data.root=DIR
#
# with the overrides that training gets (docs/planning.md, docs/slurm.md). `sbatch slurm/plan.sh …` does the same.
script=$0 # unless sbatch has made a copy of it
[ "${0##*/}" != slurm_script ] || script=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/ .*//;p;q}')
common=$(dirname "$script")/common.sh
[ -r "$common" ] || common=$SLURM_SUBMIT_DIR/slurm/common.sh
[ -r "$common" ] || { echo "error: $common is missing: submit from the checkout, by the path of this script" >&2; exit 1; }
# shellcheck source=slurm/common.sh
source "$common"

plan "$@"
