#!/usr/bin/env bash
# iret_nano-cluttered-digits from nothing: at most 20 minutes on two cores, no data needed.
set -euo pipefail
export GOMP_SPINCOUNT=0
iret train --recipe digits_nano --data cluttered-digits --out out/digits_nano --device "${DEVICE:-cpu}" "${@}"
"$(dirname "$0")/ship.sh" out/digits_nano iret_nano-cluttered-digits cluttered-digits
