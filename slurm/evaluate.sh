#!/usr/bin/env bash
# Measure a run, a checkpoint or a folder of images, shared out over all ranks (sdtrain evaluate).
#   sbatch slurm/evaluate.sh runs/sdgan_projected --json results.jsonl
#   sbatch --dependency=afterok:JOB slurm/evaluate.sh ...   once JOB has finished, however often it was requeued
#
# Settings; without the second # they count. What all jobs share is in slurm/common.sh.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Slurm runs a copy of this file, so the folder of its siblings is the one the job was submitted from
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/common.sh"
[ "$#" -gt 0 ] || { echo "sdtrain: say what to measure: sbatch slurm/evaluate.sh runs/NAME" >&2; exit 2; }
once evaluate "$@"
