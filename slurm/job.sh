# Sourced by the job scripts: `run_on_all_nodes pretrain ARGUMENTS` is the whole job.
# shellcheck shell=bash source-path=SCRIPTDIR/..
source slurm/setup.sh

run_on_all_nodes() {
    local kind="$1" run device gpus="${SLURM_GPUS_ON_NODE:-0}" srun waits=0
    shift
    [[ "${SLURM_JOB_ID:-}" ]] || fail 78 \
        "this is no Slurm job; submit the script with sbatch slurm/$kind.sbatch, or without Slurm run python -m moco_dist.$kind"
    local job="$SLURM_JOB_ID" # the last task of an array has the number of the whole array
    [[ "$job" != "${SLURM_ARRAY_JOB_ID:-}" ]] || job+="_$SLURM_ARRAY_TASK_ID"
    run="$(run_directory "$kind" "$@")" || exit
    PROCESSES="${SLURM_NTASKS_PER_NODE:-1}" device=cpu # on GPUs, one per GPU
    if ((gpus)); then
        ((PROCESSES == 1 || PROCESSES == gpus)) ||
            fail 78 "--ntasks-per-node=$PROCESSES and $gpus GPUs per node; leave out --ntasks-per-node"
        PROCESSES="$gpus" device=cuda
    else
        export ACCELERATE_USE_CPU=true
        unset SLURM_GPUS_PER_NODE SLURM_CPUS_PER_GPU # to srun, 0 GPUs would not mean none
    fi
    MOCO_DIST_OUTCOME="$(mktemp)" MOCO_DIST_LOGS="$run/logs"
    # The run saves at the latest half a minute before the end, so that the job can still be requeued.
    local end="${SLURM_JOB_END_TIME:-$(date -d "$(squeue -h -j "$job" -o %e)" +%s || true)}"
    SLURM_JOB_END_TIME="$((end - 30))" # without an end from Slurm the run ignores it
    export PROCESSES MOCO_DIST_OUTCOME MOCO_DIST_LOGS SLURM_JOB_END_TIME RUN_IN
    # When a process is gone the others save and exit by themselves; Slurm kills only after a minute.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 --wait=60 bash slurm/node.sh "moco_dist.$kind" "$@" \
        "runtime.device=$device" "runtime.processes=$((SLURM_NNODES * PROCESSES))" &
    srun="$!"
    trap 'kill -USR1 "$srun" 2>/dev/null || true' USR1 TERM # a signal sent to this script alone
    until wait "$srun" || ! kill -0 "$srun" 2>/dev/null; do ((++waits)); done
    local state status=0 refused
    state="$(squeue -h -j "$job" -o %T)"
    "${in_environment[@]}" python -m moco_dist.runs.slurm_job end "$run" "$MOCO_DIST_OUTCOME" "$state" || status="$?"
    rm -f "$MOCO_DIST_OUTCOME"
    if ((status == 200)); then
        refused="$(scontrol requeue "$job" 2>&1)" || fail 75 \
            "not requeued ($refused): submit the same command again to resume from the last checkpoint"
        status=75
    fi
    return "$status"
}
