#!/bin/bash
# A matrix on a Slurm cluster: one shard a task, one GPU a shard.
#
#   sh install.sh                                            # once, on a node that reaches a package registry
#   sbatch --array=1-8 cloud/slurm_array.sh --preset full    # 8 shards; options are those of `harness matrix`
#   .venv/bin/python -m harness repair results/all --merge results/shard-*-of-8
#
# Again for some shards only: SHARDS=8 sbatch --export=ALL,SHARDS --array=3,5 cloud/slurm_array.sh --preset full
#
# Two minutes before the time limit (and where the cluster sends preempted jobs a SIGTERM) the runs write
# checkpoints and the command exits 75; the task then queues itself again and resumes where it was. A matrix that
# ends with 75 without having been asked to (its budget is spent) does not. Results, checkpoints among them, go to
# $RESULTS, which every node must see.
#
#SBATCH --job-name=ddb-matrix
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
set -u

fail() { echo "slurm_array.sh: $1" >&2; exit 2; }

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "no array task: submit it with sbatch --array=1-N cloud/slurm_array.sh"
if [ -z "${SHARDS:-}" ]; then
    # The number of shards is that of the array's tasks, and only of a whole array, 1 to N, does Slurm tell it.
    [ "$SLURM_ARRAY_TASK_MIN" = 1 ] && [ "$SLURM_ARRAY_TASK_MAX" = "$SLURM_ARRAY_TASK_COUNT" ] ||
        fail "array tasks $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX ($SLURM_ARRAY_TASK_COUNT of them) are no whole array: say how many shards there are with SHARDS=N"
    SHARDS=$SLURM_ARRAY_TASK_COUNT
fi
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-results}
command -v "$PYTHON" >/dev/null || fail "$PYTHON is not there: sh install.sh makes it, from the folder the job is submitted in"

asked= matrix=
stop() {
    trap '' TERM  # a second one would leave without a checkpoint
    asked=yes
    [ -z "$matrix" ] || kill -TERM "$matrix" 2>/dev/null
}
trap stop TERM

# In the background, so that this shell hears the signal; not through make, which would swallow exit code 75.
"$PYTHON" -m harness matrix --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" \
    --out "$RESULTS/shard-$SLURM_ARRAY_TASK_ID-of-$SHARDS" "$@" &
matrix=$!
[ -z "$asked" ] || kill -TERM "$matrix" 2>/dev/null
wait "$matrix"
code=$?
if [ -n "$asked" ]; then  # the wait was interrupted: this is the matrix' own exit code
    wait "$matrix"
    code=$?
fi
if [ "$code" = 75 ] && [ -n "$asked" ]; then
    echo "slurm_array.sh: stopped after checkpoints; queueing shard $SLURM_ARRAY_TASK_ID/$SHARDS again" >&2
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
