#!/usr/bin/env bash
# iret_nano-cluttered-digits from nothing: at most 20 minutes on two cores, no data needed.
#   runs/digits_nano.sh                  a leg that was stopped goes on with: runs/digits_nano.sh --resume
#   PROCESSES=1 DEVICE=cuda runs/digits_nano.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH" # a process a core beats one process on two
torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m iret.cli train --recipe digits_nano --data cluttered-digits \
    --out out/digits_nano --device "${DEVICE:-cpu}" "$@"
runs/ship.sh out/digits_nano iret_nano-cluttered-digits cluttered-digits
