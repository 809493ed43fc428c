#!/usr/bin/env bash
# The whole grid of bench_linear on a machine with four GPUs, within some minutes:
# decode and prefill with host memory on GPUs 0 and 1, both with the memory of GPU 3 on GPU 2.
#
#   benchmarks/linear_grids.sh OUT [SECONDS=540]      further arguments go to every run
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1 seconds=${2:-540}
shift $(($# < 2 ? $# : 2))
mkdir -p "$out"
begun=$SECONDS

grid() { # GPUS RECORD SHARE_OF_TIME ARGUMENTS...
    local gpus=$1 record=$2 share=$3
    shift 3
    local left=$((seconds * share / 100 - (SECONDS - begun)))
    CUDA_VISIBLE_DEVICES=$gpus python3 benchmarks/bench_linear.py --out "$out" --record "$record" \
        --peers fast --seconds-per-cell 0.08 --limit-seconds "$left" "$@" >"$out/$record.log" 2>&1
    echo "$record: exit status $?, $((SECONDS - begun)) s since the start"
}

python3 -m dak_inductor.benchmarks.harness.compile_ahead
grid 0 linear 100 --m decode "$@" &
grid 1 linear_prefill 100 --m prefill "$@" &
{
    grid 2,3 linear_peer 65 --remote cuda:1 --m decode "$@"
    grid 2,3 linear_peer_prefill 100 --remote cuda:1 --m prefill --fractions 0,0.01,0.05,0.1,0.5,1.0 "$@"
} &
wait
for log in "$out"/linear*.log; do
    echo "== $(basename "$log" .log)"
    grep -A 20 "^what " "$log"
done
