#!/bin/sh
# Run the fuzz target, by default for a minute; main.cpp names the arguments.
#
#   pip install -e '.[test]' -C cmake.define.MOESHARD_ASAN=ON
#   tests/fuzz/run.sh [--seconds 3600 --seed 2 | FILE...]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
tag=$(python -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
program=$(ls "$root/build/$tag"-*/asan/fuzz_gguf 2>/dev/null | head -n 1)
if [ -z "$program" ]; then
    echo "no instrumented build for $tag: pip install -e '.[test]' -C cmake.define.MOESHARD_ASAN=ON" >&2
    exit 1
fi
exec "$program" "$@"
