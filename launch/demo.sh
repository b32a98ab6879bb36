#!/usr/bin/env bash
# Pretrains on drawn images with two CPU processes, probes the encoder and writes a report.
# Arguments override the configuration of the pretraining, as in: bash launch/demo.sh name=mine seed=1
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" "."

output=runs name=demo
for argument in "$@"; do
    case "$argument" in
        output=*) output="${argument#*=}" ;;
        name=*) name="${argument#*=}" ;;
    esac
done

# Each of the two processes gets half the cores, at most four, because the images are small.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
threads=$((cores >= 8 ? 4 : cores > 2 ? cores / 2 : 1))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export ACCELERATE_USE_CPU=true

accelerate launch --config_file launch/two_cpus.yaml \
    -m moco_dist.pretrain configs/pretrain/demo.yaml "$@"
accelerate launch --config_file launch/two_cpus.yaml \
    -m moco_dist.probe configs/probe/demo.yaml encoder="$output/$name" output="$output"

python -m moco_dist.report "$output/$name"

echo
echo "The pretraining is in $output/$name, its probe in $output/$name-probe."
echo "Open the report in a browser: $output/$name/report/report.html"
