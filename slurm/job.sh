# Sourced by the scripts beside it. `run_on_all_nodes pretrain ARGUMENTS` is the whole of a job.
# shellcheck shell=bash

fail() {
    echo "error: $2" >&2
    exit "$1"
}

# shellcheck source=slurm/environment.sh
source slurm/environment.sh
# shellcheck disable=SC2206 # words of a command
in_environment=(${RUN_IN:-})
"${in_environment[@]}" python -c 'import importlib.metadata, moco_dist; importlib.metadata.version("torch")' || fail 66 \
    "no Python with moco_dist here: run bash launch/demo.sh once, or edit slurm/environment.sh"

# Prints the run directory of a command line, or says what is wrong with it.
run_directory() {
    "${in_environment[@]}" python -m moco_dist.slurm_job directory "$@"
}

run_on_all_nodes() {
    local kind="$1" run device gpus="${SLURM_GPUS_ON_NODE:-0}" srun waits=0
    shift
    run="$(run_directory "$kind" "$@")" || exit
    # A process for each GPU; on CPUs, for each task.
    PROCESSES="${SLURM_NTASKS_PER_NODE:-1}" device=cpu
    if ((gpus)); then
        ((PROCESSES == 1 || PROCESSES == gpus)) ||
            fail 78 "--ntasks-per-node=$PROCESSES and $gpus GPUs a node; leave the first out"
        PROCESSES="$gpus" device=cuda
    else
        export ACCELERATE_USE_CPU=true
        unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU # 0 GPUs are none to srun
    fi
    MOCO_DIST_OUTCOME="$(mktemp)" MOCO_DIST_LOGS="$run/logs"
    # The run saves half a minute before the end at the latest: the job must still be requeued.
    local end="${SLURM_JOB_END_TIME:-$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s || true)}"
    SLURM_JOB_END_TIME="$((end - 30))" # of no use to the run if Slurm sets no end
    export PROCESSES MOCO_DIST_OUTCOME MOCO_DIST_LOGS SLURM_JOB_END_TIME RUN_IN
    # Processes end by themselves when one is gone, and save: Slurm kills after a minute only.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 --wait=60 bash slurm/node.sh "moco_dist.$kind" "$@" \
        "runtime.device=$device" "runtime.processes=$((SLURM_NNODES * PROCESSES))" &
    srun="$!"
    trap 'kill -USR1 "$srun" 2>/dev/null || true' USR1 TERM # a signal to this script alone
    until wait "$srun" || ! kill -0 "$srun" 2>/dev/null; do ((++waits)); done
    "${in_environment[@]}" python -m moco_dist.slurm_job end "$run" "$MOCO_DIST_OUTCOME"
}
