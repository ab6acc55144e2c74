#!/bin/sh
# Run tests with AddressSanitizer and UBSan over csrc and the bindings: by default those of lifetimes, of files and of
# the Python API. Any report fails, also one in a process that a test expects to fail.
#
#   pip install -e '.[test]' -C cmake.define.MOESHARD_ASAN=ON
#   tests/sanitizers/run.sh [PYTEST_ARGUMENT...]
set -eu
cd "$(dirname "$0")/../.."

tag=$(python -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
core=$(ls build/"$tag"-*/asan/_core*.so 2>/dev/null | head -n 1)
if [ -z "$core" ]; then
    echo "no instrumented build for $tag: pip install -e '.[test]' -C cmake.define.MOESHARD_ASAN=ON" >&2
    exit 1
fi
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
# The first allocation of a process must already be the sanitizer's. libstdc++ comes with it, because its exceptions are
# intercepted and python itself does not load it.
runtime=$(${CC:-gcc} -print-file-name=libasan.so):$(${CC:-gcc} -print-file-name=libstdc++.so)
# Containers that csrc/engine shares with llama.cpp, which is not instrumented, cannot be annotated.
common=detect_container_overflow=0:detect_stack_use_after_return=1:log_path=$reports/asan
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$reports/ubsan

failed=0
ASAN_OPTIONS=$common:detect_leaks=1 "$(dirname "$core")/consumer_asan" python/moeshard/data/tinymoe.gguf || failed=1

# The interpreter and its extension modules leave memory to the end of the process, so leaks are looked for above and
# by tests/lifetime/test_growth.py.
[ $# -gt 0 ] || set -- -q tests/lifetime tests/gguf tests/robustness tests/test_model.py \
    tests/split/test_faults.py tests/split/test_outputs.py tests/split/test_shard_*.py tests/split/test_merge_bad.py
LD_PRELOAD=$runtime ASAN_OPTIONS=$common:detect_leaks=0 MOESHARD_TEST_CORE=$PWD/$core python -m pytest "$@" || failed=1

if [ -n "$(ls "$reports")" ]; then
    cat "$reports"/*
    failed=1
fi
exit $failed
