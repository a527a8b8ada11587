#!/usr/bin/env bash
# Enlarge a data set or a film, or draw one, on all ranks (sdtrain upscale, sdtrain sample --shards); again, it goes on.
#   sbatch slurm/data_set.sh upscale shards/div2k --model student/model.safetensors --out shards/div2k_x4
#   sbatch slurm/data_set.sh sample runs/sdgan_projected --num-images 50000 --shards 50 --out shards/drawn
#
# Settings; without the second # they count. What all jobs share is in slurm/common.sh.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=data_set
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
[ "$#" -gt 0 ] || { echo "sdtrain: say what to do: sbatch slurm/data_set.sh upscale|sample ..." >&2; exit 2; }
once "$@"
