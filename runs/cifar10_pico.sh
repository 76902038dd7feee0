#!/usr/bin/env bash
# iret_pico-cifar10 from CIFAR-10 as parquet (a folder with train.parquet and test.parquet, or a hub id).
#   runs/cifar10_pico.sh DATA            two cores
#   RECIPE=cifar10_pico DEVICE=cuda runs/cifar10_pico.sh DATA
# A leg that was stopped goes on with: runs/cifar10_pico.sh DATA --resume
set -euo pipefail
export GOMP_SPINCOUNT=0
data=$1
shift
recipe=${RECIPE:-cifar10_pico_cpu}
iret train --recipe "$recipe" --data "$data" --out "out/$recipe" --device "${DEVICE:-cpu}" "${@}"
"$(dirname "$0")/ship.sh" "out/$recipe" iret_pico-cifar10 "$data"
