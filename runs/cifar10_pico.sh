#!/usr/bin/env bash
# iret_pico-cifar10 from CIFAR-10 as parquet (a folder with train.parquet and test.parquet, or a hub id).
#   runs/cifar10_pico.sh DATA            two cores; a leg that was stopped goes on with: runs/cifar10_pico.sh DATA --resume
#   RECIPE=cifar10_pico PROCESSES=1 DEVICE=cuda runs/cifar10_pico.sh DATA
set -euo pipefail
data=$1
shift
[ ! -e "$data" ] || data=$(realpath "$data")
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" # a process a core beats one process on two
recipe=${RECIPE:-cifar10_pico_cpu}
torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m iret.cli train --recipe "$recipe" --data "$data" \
    --out "out/$recipe" --device "${DEVICE:-cpu}" "$@"
runs/ship.sh "out/$recipe" iret_pico-cifar10 "$data"
