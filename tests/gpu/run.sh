#!/usr/bin/env bash
# All tests that need a GPU: those that share the card on several processes, then those that measure
# the time or the memory of the whole card. Further arguments go to pytest.
#
#   tests/gpu/run.sh [-k EXPRESSION]      WORKERS=6 processes, at most SECONDS_PER_TEST=240 each
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
common=(tests/gpu -q -p no:cacheprovider --timeout "${SECONDS_PER_TEST:-240}" --tb short -rfE)

python3 -m pytest "${common[@]}" -m "not alone" -n "${WORKERS:-6}" "$@"
shared=$?
python3 -m pytest "${common[@]}" -m alone "$@"
alone=$?
# 5: this selection has no such tests
[[ $shared == 0 || $shared == 5 ]] && [[ $alone == 0 || $alone == 5 ]] && [[ $shared != 5 || $alone != 5 ]]
