#!/usr/bin/env bash
# The extension and the stand-in drivers under AddressSanitizer, LeakSanitizer and
# UndefinedBehaviorSanitizer. Needs g++ and the `test` extra, no GPU; fails at any report.
#
#   tests/sanitize.sh [arguments of pytest]
#
# Left out, with the reasons in sitecustomize.py: what safetensors loses as it reads, and leaks of
# forked children. What the tools are told, and why:
#   handle_segv=0           a test writes to what is only to be read and wants the signal
#   leak_check_at_exit=0    sitecustomize.py looks before the interpreter is torn down
#   PYTHONMALLOC=malloc     Python's own arenas hide what points at memory, and overruns inside them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=build/sanitized
flags="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
cmake -G Ninja -S . -B $build -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$flags" \
  -DDAK_WARNINGS_AS_ERRORS=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DPython_EXECUTABLE="$(command -v python)" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build $build

reports=$PWD/$build/reports
rm -rf "$reports" && mkdir "$reports"
printf '#!/bin/sh\nexec g++ %s "$@"\n' "$flags" >$build/g++ && chmod +x $build/g++

export SANITIZED_DRIVER
SANITIZED_DRIVER=$(echo "$PWD"/$build/_driver.*.so)
export CXX=$PWD/$build/g++ PYTHONMALLOC=malloc PYTHONPATH=$PWD/tests/sanitize
export ASAN_OPTIONS=handle_segv=0:leak_check_at_exit=0:detect_stack_use_after_return=1:strict_string_checks=1:log_path=$reports/address
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$reports/undefined
preload=""
for library in asan ubsan stdc++; do preload+="$(g++ -print-file-name=lib$library.so) "; done

[[ $# -gt 0 ]] || set -- tests/cpu/vmm tests/cpu/test_launch.py tests/cpu/test_nvrtc.py
status=0
LD_PRELOAD=$preload python -m pytest -q -p no:cacheprovider "$@" </dev/null || status=$?
found=$(find "$reports" -type f | wc -l)
echo "$found reports in $reports"
[[ $found -eq 0 && $status -eq 0 ]]
