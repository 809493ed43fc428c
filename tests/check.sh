#!/usr/bin/env bash
# Everything that can be checked without a GPU, in an environment that has the `test` extra installed.
# The first three commands are also the hooks of .pre-commit-config.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ruff check .
ruff format --check .
mypy
pytest tests/cpu -n 2 --durations=10 </dev/null
