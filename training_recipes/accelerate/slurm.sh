#!/bin/bash
# A recipe on any number of SLURM nodes: one torchrun per node, one process per GPU.
#   sbatch --nodes=32 training_recipes/accelerate/slurm.sh RECIPE parallel.shard=all parallel.expert=8
# Nodes: parallel.expert (and each pipeline stage) must divide the number of processes; with parallel.expert=16 on nodes
# of 8 GPUs that is any multiple of 2, and with parallel.pipeline=16 beside it any multiple of 32.
# output_dir and data.cache_dir must be on a disk that all nodes see.
#
# The job survives what happens to jobs:
#   preemption, time limit   SIGTERM comes GRACE seconds early; a checkpoint is saved, the job goes back to the queue
#   a process crashes        all are restarted from the newest checkpoint, up to RESTARTS times
#   a node dies              --requeue: SLURM starts the job again, and the same command continues
#
#SBATCH --job-name=k2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@900

set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: sbatch --nodes=N $0 RECIPE [key=value ...]" >&2
    exit 2
fi

GPUS=${GPUS:-8}            # per node
RESTARTS=${RESTARTS:-3}
GRACE=${GRACE:-840}        # seconds for the last step and its checkpoint; below the 900 of --signal
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$GPUS} / GPUS))}
# An agent that joins in a later round of the rendezvous gets rank 0's address only without the shared store (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# accelerate launch would do as well (multi_node.yaml), but has no --shutdown-timeout: after SIGTERM, torchrun gives its
# processes so long to save, and kills them after that. The default of 30 seconds is too short for large models.
srun --kill-on-bad-exit=1 --wait=60 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$GPUS" \
    --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" \
    --max-restarts "$RESTARTS" --shutdown-timeout "$GRACE" \
    -m transformers_k2.training "$@" &
STEP=$!

# B: sends the signal to this script alone. It goes on to the processes of the step; srun, if it were sent to it, would
# kill them.
TOLD=0
trap 'TOLD=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

STATUS=0
wait $STEP || STATUS=$?
while kill -0 $STEP 2>/dev/null; do   # a trap ends wait early
    STATUS=0
    wait $STEP || STATUS=$?
done
if [ $TOLD -eq 1 ] && [ $STATUS -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $STATUS
