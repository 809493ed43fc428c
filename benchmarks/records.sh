#!/usr/bin/env bash
# Most records on a machine with four GPUs, side by side: host memory on GPUs 0 and 1, the memory of
# GPU 3 on GPU 2. Each record is written as it grows, so what the time limit cuts is kept.
#
#   benchmarks/records.sh OUT [SECONDS=900]           further arguments go to every benchmark
#   ONLY="linear attention" benchmarks/records.sh OUT    these records and no others
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1 limit=${2:-900}
shift $(($# < 2 ? $# : 2))
common=("$@")
mkdir -p "$out"
begun=$SECONDS

left() { echo $((limit - (SECONDS - begun))); }

run() { # GPUS RECORD BENCHMARK ARGUMENTS...: killed 15 s after the limit
    local gpus=$1 record=$2 benchmark=$3
    shift 3
    [[ -z ${ONLY:-} || " $ONLY " == *" $record "* ]] || return 0
    (($(left) > 20)) || { echo "$record: no time left"; return; }
    CUDA_VISIBLE_DEVICES=$gpus PYTHONUNBUFFERED=1 timeout $(($(left) + 15)) python3 "benchmarks/$benchmark.py" \
        --out "$out" "$@" "${common[@]}" >"$out/$record.log" 2>&1
    echo "$record: exit status $?, $((SECONDS - begun)) s since the start"
}

grid() { # GPUS RECORD BENCHMARK ARGUMENTS...
    local gpus=$1 record=$2 benchmark=$3
    shift 3
    run "$gpus" "$record" "$benchmark" --record "$record" --peers fast --limit-seconds "$(left)" "$@"
}

decode=(--m decode --seconds-per-cell 0.05)
python3 -m dak_inductor.benchmarks.harness.compile_ahead &
run 0 load bench_load --remote cpu # before others use the host's memory
wait
prefill=(--m prefill --seconds-per-cell 0.08)
few=(--fractions 0,0.01,0.1,0.5,1.0)
{
    run 0 over_budget generate_over_budget --remote cpu
    grid 0 linear bench_linear --remote cpu "${decode[@]}"
    run 0 decode_step bench_step --remote cpu --fractions 0.02,0.05,0.1,0.5 \
        --seconds-per-row 0.5 --limit-seconds "$(left)"
    run 0 marks bench_marks --remote cpu
} &
{
    grid 1 linear_prefill bench_linear --remote cpu "${prefill[@]}"
    run 1 long_context bench_long_context --remote cpu --host-memory 110GB
    grid 1 attention bench_attention --remote cpu --seconds-per-cell 0.1 "${few[@]}"
} &
{
    grid 2,3 linear_peer bench_linear --remote cuda:1 "${decode[@]}"
    grid 2,3 linear_peer_prefill bench_linear --remote cuda:1 "${prefill[@]}" \
        --fractions 0,0.01,0.05,0.1,0.5,1.0
    grid 2,3 attention_peer bench_attention --remote cuda:1 --seconds-per-cell 0.1 "${few[@]}"
} &
wait
for log in "$out"/*.log; do
    echo "== $(basename "$log" .log)"
    grep -A 20 "^what " "$log"
done
