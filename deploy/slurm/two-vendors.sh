#!/bin/bash
# One heterogeneous job: a component on each vendor's partition, and a Ray cluster over both.
#
#   sbatch two-vendors.sh recipe.toml
#
# To change: the partitions and sizes, how a node is given all of its chips, and the two environments. Every node sees
# the folder in which sbatch was called. The first node of the first component has the head and the command.
#SBATCH --job-name=isthmus
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --partition=CHANGE-ME-nvidia
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=gpu:8
#SBATCH hetjob
#SBATCH --partition=CHANGE-ME-ascend
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=npu:8
set -euo pipefail

recipe=${1:?usage: sbatch two-vendors.sh RECIPE}
home=${ISTHMUS_HOME_ENV:-/opt/isthmus-home}    # environments with Isthmus, Ray and the torch of their vendor
away=${ISTHMUS_AWAY_ENV:-/opt/isthmus-away}
port=6379
head=$(hostname)

stop() {
    kill -TERM "$run" 2>/dev/null || true
    wait "$run" || true
}

"$home/bin/ray" start --head --node-ip-address="$head" --port="$port" --labels=vendor=nvidia --disable-usage-stats
trap '"$home/bin/ray" stop' EXIT

# The other nodes of the first component, and all of the second; each srun ends with the job.
if [ "${SLURM_JOB_NUM_NODES_HET_GROUP_0:-${SLURM_JOB_NUM_NODES:-1}}" -gt 1 ]; then
    others=$((${SLURM_JOB_NUM_NODES_HET_GROUP_0:-$SLURM_JOB_NUM_NODES} - 1))
    srun --het-group=0 --nodes="$others" --ntasks="$others" --exclude="$head" \
        "$home/bin/ray" start --address="$head:$port" --labels=vendor=nvidia --block &
fi
srun --het-group=1 "$away/bin/ray" start --address="$head:$port" --labels=vendor=ascend --block &

export RAY_ADDRESS="$head:$port"
for _ in $(seq 60); do
    "$home/bin/isthmus" cluster "$recipe" && break
    sleep 5
done

# Before the time is over, the step saves what it has; the same command goes on from there.
"$home/bin/isthmus" run "$recipe" &
run=$!
trap stop TERM
wait "$run"
