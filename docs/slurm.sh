#!/bin/bash
# One run on several hosts under Slurm: sbatch docs/slurm.sh params/mine.yaml
# The folder of the run (model_dir) is on a file system that all hosts see. A job that is stopped (time limit,
# preemption) checkpoints first; the same command, or the requeued job, goes on from there.
#SBATCH --job-name=xdistil
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue

export PARAMS="$1" PER_HOST="${PER_HOST:-${SLURM_GPUS_ON_NODE:-1}}" MASTER_PORT="${MASTER_PORT:-29500}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR

# in single quotes: each host fills in its own number
srun --kill-on-bad-exit=1 bash -c 'exec python -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$PER_HOST" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m xdistil.stages "$PARAMS"'
