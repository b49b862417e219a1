#!/usr/bin/env bash
# Train, and write every version of the weights that a step of RL makes into FOLDER: as what changed since the version before,
# with hashes. Carry the folder to where the engines are (a shared disk, rsync, an object store).
#
#   rl_elsewhere_train.sh RECIPE STEP FOLDER [further options of `isthmus run`]
set -euo pipefail
recipe=$1 step=$2 folder=$3
isthmus run "$recipe" --set "step.$step.publish=$(realpath -m "$folder")" "${@:4}"
