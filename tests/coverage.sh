#!/usr/bin/env bash
# Lines of the package that the tests run, by package and with the files that miss most.
#
#   tests/coverage.sh run [arguments of pytest]    measures, tests/cpu by default; adds to what is there
#   tests/coverage.sh report                       over everything measured
#
# What a card adds: `tests/coverage.sh run tests/gpu` there, then copy its build/coverage/.coverage.*
# here. Needs `pip install coverage`. Processes that tests start and kill are measured too; code that
# Dynamo traces runs under the compiler and shows as run where it is traced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export COVERAGE_FILE=$PWD/build/coverage/.coverage COVERAGE_RCFILE=$PWD/pyproject.toml
mkdir -p build/coverage

case ${1:-} in
run)
  shift
  [[ $# -gt 0 ]] || set -- tests/cpu -n 2
  python -m coverage run -m pytest -q -p no:cacheprovider "$@" </dev/null
  ;;
report)
  export COVERAGE_FILE=$PWD/build/coverage/combined
  python -m coverage combine --keep -q build/coverage/.coverage.*
  for package in dak_inductor lowering cuda_runtime benchmarks; do
    printf '%-14s' $package
    python -m coverage report --include="$package/*" | tail -1
  done
  python -m coverage report --sort=miss | tail -22
  ;;
*)
  sed -n '2,9p' "${BASH_SOURCE[0]}"
  exit 2
  ;;
esac
