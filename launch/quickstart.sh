#!/usr/bin/env bash
# From nothing to a trained generator on the CPU: set up, pack real photographs, train on 2 ranks, evaluate, say where to
# look. Needs Python, pip and git only. Run again, it goes on from the last checkpoint instead of starting over.
#
#   bash launch/quickstart.sh          SD-GAN with ProjectedGAN's networks, configs/quickstart.yaml
#   bash launch/quickstart.sh sdakd    the same for configs/quickstart_sdakd.yaml
#
#   data/NAME/photos/    the photographs that scikit-image ships
#   data/NAME/shards/    crops of them as tar shards
#   runs/NAME/           the run (README.md explains its files)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
name="quickstart${1:+_$1}"
[ -f "configs/$name.yaml" ] || fail "configs/$name.yaml does not exist; there is: $(echo configs/quickstart*.yaml)"

setup_venv quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread a rank
export SDTRAIN_CPU="${SDTRAIN_CPU-1}"           # set it empty to use GPUs

if [ ! -f "data/$name/shards/manifest.json" ]; then
    say "cutting photographs into 32 px pieces and packing them"
    python -c 'import sys; from sdtrain.data.photos import *; export_photos(sys.argv[1], 256, PICTURES)' "data/$name/photos"
    sdtrain pack "data/$name/photos" "data/$name/shards" --tile 32 --stride 8 --shard-count 4
fi

say "training on 2 ranks (again from the last checkpoint, if there is one)"
# --multi_gpu is what starts several processes, on a CPU as well; --cpu would silently start one
accelerate launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0 --mixed_precision no \
    --dynamo_backend no sdtrain/main.py --cfg "$name"

say "evaluating"
sdtrain evaluate "runs/$name"

say "done. Look at:"
echo "  runs/$name/samples/     what the generator drew from the same latents as training went on"
echo "  tensorboard --logdir runs/$name/tensorboard"
[ -x "$(command -v sdtrain)" ] && echo "  (first: source ${VENV#"$ROOT"/}/bin/activate)"
