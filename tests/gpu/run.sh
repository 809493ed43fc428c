#!/usr/bin/env bash
# All tests that need a GPU: those that share the card on several processes, then those that measure
# the time or the memory of the whole card. Further arguments go to pytest.
#
#   tests/gpu/run.sh [-k EXPRESSION]      WORKERS=6 processes, at most SECONDS_PER_TEST=240 each
#   CARDS=2 LOGS=DIR tests/gpu/run.sh     shares the tests among that many cards, each with WORKERS
#                                         processes and a log in DIR; cards see each other as peers
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cards=${CARDS:-1} logs=${LOGS:-.}
common=(-q -p no:cacheprovider --timeout "${SECONDS_PER_TEST:-240}" --tb short -rfE)
# 5: this selection has no such tests
fine() { [[ $1 == 0 || $1 == 5 ]]; }

python3 -m dak_inductor.benchmarks.harness.compile_ahead || exit 1
if ((cards == 1)); then
    python3 -m pytest tests/gpu "${common[@]}" -m "not alone" -n "${WORKERS:-6}" "$@"
    shared=$?
else
    running=() shared=5
    mkdir -p "$logs"
    for ((card = 0; card < cards; card++)); do
        visible=$(for ((i = 0; i < cards; i++)); do echo $(((card + i) % cards)); done | paste -sd ,)
        mapfile -t files < <(printf '%s\n' tests/gpu/test_*.py | awk "NR % $cards == $card")
        CUDA_VISIBLE_DEVICES=$visible python3 -m pytest "${files[@]}" "${common[@]}" -m "not alone" \
            -n "${WORKERS:-6}" "$@" >"$logs/shared-$card.log" 2>&1 &
        running+=($!)
    done
    for card in "${!running[@]}"; do
        wait "${running[$card]}"
        status=$?
        echo "card $card: $(tail -n 1 "$logs/shared-$card.log")"
        if ! fine "$status"; then
            shared=$status
        elif [[ $status == 0 && $shared == 5 ]]; then
            shared=0
        fi
    done
fi
python3 -m pytest tests/gpu "${common[@]}" -m alone "$@"
alone=$?
fine "$shared" && fine "$alone" && [[ $shared != 5 || $alone != 5 ]]
