#!/usr/bin/env bash
# All tests that need a GPU: those that share a card on several processes, then those that measure
# the time or the memory of a whole card. Further arguments go to pytest.
#
#   tests/gpu/run.sh [-k EXPRESSION]    WORKERS=6 processes, at most SECONDS_PER_TEST=240 each
#   CARDS=2 tests/gpu/run.sh            on that many cards: WORKERS processes on each, which see the
#                                       other cards as peers; tests of a whole card run on each card
#                                       at once, without peers, and last, one by one, those that need
#                                       peers or time pages of host memory
#   PARTS="shared alone peers"          only these parts
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cards=${CARDS:-1} wanted=" ${PARTS:-shared alone peers} "
common=(-q -p no:cacheprovider --timeout "${SECONDS_PER_TEST:-240}" --tb short -rfE)
passed=0 wrong=0

part() { # NAME, MARKS of the tests, pytest's ARGUMENTS...
    local name=$1 marks=$2
    shift 2
    [[ $wanted == *" $name "* ]] || return 0
    python3 -m pytest tests/gpu "${common[@]}" -m "$marks" "$@"
    case $? in
        0) passed=1 ;;
        5) ;; # this selection has no such tests
        *) wrong=1 ;;
    esac
}

python3 -m dak_inductor.benchmarks.harness.compile_ahead || exit 1
export CARDS=$cards
part shared "not alone" -n "$((cards * ${WORKERS:-6}))" "$@"
if ((cards == 1)); then
    part alone alone "$@"
else
    PEERS=0 part alone "alone and not gpus and not host" -n "$cards" --maxschedchunk 1 "$@"
    part peers "alone and (gpus or host)" "$@"
fi
((passed && !wrong))
