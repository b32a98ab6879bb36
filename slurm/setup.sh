# Sourced by the other scripts in this folder, in the root of the clone: what they need to call moco_dist.
# shellcheck shell=bash source-path=SCRIPTDIR/..

fail() {
    echo "error: $2" >&2
    exit "$1"
}

source slurm/environment.sh
# shellcheck disable=SC2206 # words of a command
in_environment=(${RUN_IN:-})
"${in_environment[@]}" python -c 'import importlib.metadata, moco_dist; importlib.metadata.version("torch")' || fail 66 \
    "no Python with moco_dist here: run bash launch/demo.sh once, or edit slurm/environment.sh"

# Prints the run directory of a command line, or says what is wrong with it.
run_directory() {
    "${in_environment[@]}" python -m moco_dist.runs.slurm_job directory "$@"
}
