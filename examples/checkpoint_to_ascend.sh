#!/usr/bin/env bash
# A checkpoint becomes a sealed bundle that vllm-ascend reads, with the proof in it. No chip is needed: an Ascend 910B
# is rehearsed. On the chip's own machine `isthmus verify BUNDLE --device npu` repeats the proof there.
#
#   checkpoint_to_ascend.sh CHECKPOINT [BUNDLE] [further options of `isthmus handoff`]
set -euo pipefail
checkpoint=$1
bundle=${2:-$(basename "$checkpoint")-ascend}

# What the chip's software makes of this model: which operators it lacks, or runs on the host.
isthmus coverage "$checkpoint" --chip ascend-910b-313t

# Convert, follow every weight, replay every module under the chip's rules, and seal; exit code 1 says which module broke.
isthmus handoff "$checkpoint" --for vllm-ascend --target ascend-910b-313t --out "$bundle" "${@:3}"

# What it is now, what was found, and what it costs in nats per token.
isthmus inspect "$bundle"
