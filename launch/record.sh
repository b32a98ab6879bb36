#!/usr/bin/env bash
# Runs the list in launch/record.txt on one GPU, in pieces: each call works for RECORD_SECONDS (500) and
# exits with status 75 if there is more to do. The same call continues from there and skips finished
# runs. With CIFAR-10 as DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg:
#   until bash launch/record.sh DIR; do [[ $? == 75 ]] || break; done
#   bash launch/record.sh DIR [key=value for the pretrainings ...] [-- key=value for the probes ...]
#   python launch/record_table.py runs/record      # the table of results
# RECORD_TABLE names another list, such as launch/record_choices.txt, and RECORD_OUTPUT another folder, both
# relative to the repository. RECORD_PYTHON names a Python with the packages; without it .venv is created.
set -euo pipefail
table="${RECORD_TABLE:-launch/record.txt}" output="${RECORD_OUTPUT:-runs/record}" seconds="${RECORD_SECONDS:-500}"
fail() { echo "error: $2" >&2 && exit "$1"; }
# A shorter piece would end before it has done anything, and the loop above would never end.
[[ "$seconds" =~ ^[1-9][0-9]{0,6}$ && "$seconds" -gt 30 ]] || fail 78 "RECORD_SECONDS=$seconds: give a whole number of seconds above 30, such as 500"
data="$(realpath -- "${1:?give the folder of the images, with train and test in it}")"
[[ -d "$data/train" && -d "$data/test" ]] || fail 66 "$data has no train and test; give the folder with both"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
[[ "${RECORD_PYTHON:-}" ]] || source launch/environment.sh "."
shift
pretrain=("data.name=folder" "data.root=$data") probe=("data.name=folder" "data.root=$data")
while (($#)) && [[ "$1" != -- ]]; do pretrain+=("$1") && shift; done
probe+=("${@:2}")
mkdir -p "$output" && end="$((SECONDS + seconds))"

# Runs one to its end, or for the rest of this piece, and records how long that took.
run() {
    local kind="$1" name="$2" began="$SECONDS" left="$((end - SECONDS))" status=0 && shift 2
    [[ ! -e "$output/$name/DONE" ]] || return 0
    ((left > 30)) || { echo "the piece is over; the same call continues with $name" && exit 75; }
    "${RECORD_PYTHON:-python}" -m "moco_dist.$kind" "$@" "output=$output" "name=$name" \
        "runtime.max_hours=$(LC_ALL=C awk "BEGIN { print $left / 3600 }")" </dev/null || status="$?"
    printf '{"run": "%s", "seconds": %d, "exit_status": %d, "commit": "%s"}\n' "$name" \
        "$((SECONDS - began))" "$status" "$(git describe --always --dirty --abbrev=7)" >>"$output/pieces.jsonl"
    ((status == 0)) || exit "$status"
    [[ -e "$output/$name/DONE" ]] || fail 78 "$name ended before it was done; remove what stops it"
}

lines="$(sed -e 's/[\t\r]/ /g; s/#.*//' -e '/^ *$/d' -e 's, \(PRETRAIN\|PROBE\)/, configs/\L\1/,g' "$table")"
# Otherwise a faulty probe would only be noticed hours later.
bad="$(grep -Evm1 '^[^ ]+ +[0-9]+(,[0-9]+)* +[^ ].* -- +[^ ]' <<<"$lines" || true)"
[[ "$lines" && -z "$bad" ]] || fail 78 "$table: '$bad' is no line of name, seeds, pretraining, --, probe"
# The first seed of each line, then the others.
runs="$(awk '{ n = split($2, seeds, ","); for (i = 1; i <= n; i++) { $2 = seeds[i]; print (i > 1), $0 } }' <<<"$lines" | sort -s -k 1,1)"
# shellcheck disable=SC2086 # words of a line
while read -r _ name seed words; do
    run pretrain "$name-$seed" ${words%% -- *} "seed=$seed" "${pretrain[@]}"
    run probe "$name-$seed-probe" ${words##* -- } "seed=$seed" "encoder=$output/$name-$seed" "${probe[@]}"
done <<<"$runs"
