#!/usr/bin/env bash
# Run a training script under the rules of a chip that is not here. The script needs no change; what the chip would
# refuse ends it with the reason and its source, and what it would run on the host's CPU is counted.
#
#   does_it_run.sh CHIP train.py [options of the script]
#   RANKS=4 does_it_run.sh ascend-910b-313t train.py
set -euo pipefail
chip=$1
isthmus rehearse --chip "$chip" ${RANKS:+--ranks "$RANKS"} -- python "${@:2}"
