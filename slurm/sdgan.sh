#!/usr/bin/env bash
# SD-GAN on ProjectedGAN's networks.
#   sbatch slurm/sdgan.sh                                   configs/sdgan_projected.yaml
#   sbatch slurm/sdgan.sh --cfg FILE --set KEY=VALUE ...    any other; sbatch's own options come before the script
# The same command goes on from the last checkpoint. Near its time limit, or when a node or process fails, the job
# requeues itself; a mistake of yours, or a run that no longer moves, ends it. Several nodes: sbatch --nodes=4 ...
#
# Settings; without the second # they count. What all jobs share is in slurm/common.sh.
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --job-name=sdgan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

# Slurm runs a copy of this file, so the folder of its siblings is the one the job was submitted from
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/common.sh"
[ "$#" -gt 0 ] || set -- --cfg sdgan_projected
run "$@"
