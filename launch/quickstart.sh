#!/usr/bin/env bash
# From nothing to a trained generator on the CPU: set up, pack real photographs, train on 2 ranks, evaluate, say where to
# look. Needs Python, pip and git only. Run again, it goes on from the last checkpoint instead of starting over.
#
#   bash launch/quickstart.sh          SD-GAN with StyleGAN2's networks, configs/quickstart.yaml; seven minutes on two cores
#   bash launch/quickstart.sh sdakd    the same for configs/quickstart_sdakd.yaml
#
#   data/NAME/crops/     a face, a cat, a cup and a rocket, from the photographs that scikit-image ships (sdakd: photos/)
#   data/NAME/shards/    the same as tar shards
#   runs/NAME/           the run (README.md explains its files)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
name="quickstart${1:+_$1}"
[ -f "configs/$name.yaml" ] || fail "configs/$name.yaml does not exist; there is: $(echo configs/quickstart*.yaml)"

setup_venv quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread a rank
export SDTRAIN_CPU="${SDTRAIN_CPU-1}"           # set it empty to use GPUs

# Super-resolution: 64 px pieces to train on, and 192 px pieces of two photographs that no stage of training sees.
pack_for_sdakd() {
    local data="data/$name" part
    python -c 'import sys; from sdtrain.data.pack.photos import *; export_photos(sys.argv[1], PICTURES)' "$data/photos"
    echo rocket.png > "$data/val.txt"
    echo coffee.png > "$data/test.txt"
    cat "$data/val.txt" "$data/test.txt" > "$data/held_back.txt"
    for part in val test; do
        sdtrain pack "$data/photos" "$data/$part" --tile 192 --list "$data/$part.txt" --shard-count 1
    done
    sdtrain pack "$data/photos" "$data/shards" --tile 64 --stride 16 --exclude-list "$data/held_back.txt" --shard-count 2
}

if [ -f "data/$name/shards/manifest.json" ]; then
    say "data/$name is packed already"
elif [ "$name" = quickstart_sdakd ]; then
    say "cutting photographs into pieces and packing them"
    pack_for_sdakd
else
    say "cutting 1000 crops of 32 px from each of four photographs and packing them, one class a photograph"
    python -c 'import sys; from sdtrain.data.pack.photos import *; export_crops(sys.argv[1])' "data/$name/crops"
    sdtrain pack "data/$name/crops" "data/$name/shards" --resolution 32 --labels folder --shard-count 4
fi

say "training on 2 ranks (again from the last checkpoint, if there is one)"
accelerate launch --config_file launch/cpu2.yaml sdtrain/main.py --cfg "$name"

if [ "$name" = quickstart_sdakd ]; then
    say "done. The table above compares student, teacher and bicubic enlargement on photographs held back. Look at:"
    echo "  runs/$name/samples/     strips LQ | bicubic | student | teacher | HQ, and what the discriminators say"
else
    say "what validation saw (runs/$name/metrics.jsonl)"
    python - "runs/$name/metrics.jsonl" <<'PYTHON'
import json, sys

rows = [row for row in map(json.loads, open(sys.argv[1])) if row["kind"] == "eval"]
for row in rows:
    values = {k: v for k, v in row.items() if isinstance(v, float)}
    print(f"  {row['seen_img']:>7} images  {row['split']:<4}  " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
PYTHON
    say "done. Look at:"
    echo "  runs/$name/samples/     what the generator drew from the same latents as training went on"
fi
echo "  tensorboard --logdir runs/$name/tensorboard"
[ -x "$(command -v sdtrain)" ] && echo "  (first: source ${VENV#"$ROOT"/}/bin/activate)"
