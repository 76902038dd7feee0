#!/usr/bin/env bash
# Turn a finished run into a checkpoint of the package: search its operating points, measure it on the test images, write its
# card, copy what is shipped. Leave the machine alone meanwhile: milliseconds are measured too.
#   runs/ship.sh RUN_FOLDER NAME DATA
set -euo pipefail
run=$1 name=$2 data=$3
target="$(dirname "$0")/../src/iret/checkpoints/$name"
PATH="$(dirname "$0")/../.venv/bin:$PATH"
iret calibrate "$run" --data "$data" --threads 1
iret card "$run" --data "$data" --name "$name"
mkdir -p "$target"
cp "$run"/{config.json,model.safetensors,points.json,recipe.json,log.csv,README.md} "$target/"
if [ -e "$run/static_vit.json" ]; then cp "$run/static_vit.json" "$target/"; fi   # recipe.json of benchmarks/static_vit.py
ls -l "$target"
