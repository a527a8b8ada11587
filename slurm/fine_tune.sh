#!/usr/bin/env bash
# Train on from a finished run or from official weights, with a configuration of your own.
#   sbatch slurm/fine_tune.sh --cfg my_finetune.yaml [--set KEY=VALUE ...]
# The same command goes on from the last checkpoint. Near its time limit, or when a node or process fails, the job
# requeues itself; a mistake of yours, or a run that no longer moves, ends it. Several nodes: sbatch --nodes=4 ...
#
# Settings; without the second # they count. What all jobs share is in slurm/common.sh.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=fine_tune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

# Slurm runs a copy of this file, so the folder of its siblings is the one the job was submitted from
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/common.sh"
[ "$#" -gt 0 ] || { echo "sdtrain: name a configuration: sbatch slurm/fine_tune.sh --cfg FILE" >&2; exit 2; }
run "$@"
