#!/usr/bin/env bash
# Make tar shards from a folder or zip (sdtrain pack); the same command again continues where it stopped.
#   sbatch slurm/pack.sh ~/ffhq shards/ffhq256 --resolution 256 --resize box
#
# Pack, train, measure:
#   id=$(sbatch --parsable slurm/pack.sh ~/ffhq shards/ffhq256 --resolution 256 --resize box)
#   id=$(sbatch --parsable --dependency=afterok:$id slurm/sdgan.sh)
#   sbatch --dependency=afterok:$id slurm/evaluate.sh runs/sdgan_projected
#
# Settings; without the second # they count. What all jobs share is in slurm/common.sh.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Slurm runs a copy of this file, so the folder of its siblings is the one the job was submitted from
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/common.sh"
[ "$#" -gt 0 ] || { echo "sdtrain: say what to pack: sbatch slurm/pack.sh SOURCE SHARDS" >&2; exit 2; }
once pack "$@"
