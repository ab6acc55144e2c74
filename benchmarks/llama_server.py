"""Build stock llama.cpp's own programs from exactly the pin, to compare with.

    python benchmarks/llama_server.py                   # llama-server; prints where it is
    python benchmarks/llama_server.py ggml-rpc-server llama-bench

Untouched source, from the archive that third_party/llama.cpp/pin.txt names, compiled as ours is: Release, for this
machine, llama.cpp's own threads, RPC. Without TLS, downloads and the web page, which benchmarks do not use. It takes
minutes the first time (less with ccache) and a moment later on. All of it lies in build/llama-server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "third_party" / "llama.cpp"))

import prepare  # noqa: E402  (a script of that folder)

BUILD = ROOT / "build" / "llama-server"
PROGRAMS = ("llama-server", "llama-bench", "ggml-rpc-server")
PATHS = (*prepare.BUILD_PATHS, "common", "licenses", "scripts/ui-assets.cmake", "tools", "vendor")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_CCACHE": "OFF",  # the launcher is given below
    "GGML_NATIVE": "ON",
    "GGML_OPENMP": "OFF",
    "GGML_RPC": "ON",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    # Without these it asks git about a repository that is not its own.
    "LLAMA_BUILD_COMMIT": "pinned",
    "LLAMA_BUILD_NUMBER": "0",
}


def build(program: str = "llama-server", build_dir: Path = BUILD) -> Path:
    """Return the path of one of `PROGRAMS`, built where it is not there yet.

    Raises:
        prepare.PrepareError: the pinned source cannot be had.
        subprocess.CalledProcessError: it does not compile; cmake said why.
    """
    source, out = build_dir / "source", build_dir / "cmake"
    prepare.make_tree(source, PATHS, patched=False)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    ccache = shutil.which("ccache")
    if ccache:
        launcher = f"env;CCACHE_BASEDIR={source};CCACHE_NOHASHDIR=1;{ccache}"
        options += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in ("C", "CXX")]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    run = {"check": True, "stdout": sys.stderr}
    subprocess.run(["cmake", "-S", source, "-B", out, *options], **run)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["nice", "cmake", "--build", out, "--target", program, "--parallel", jobs], **run)
    return out / "bin" / program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    args = parser.parse_args()
    for program in args.programs or PROGRAMS[:1]:
        if program not in PROGRAMS:
            parser.error(f"'{program}' is none of {', '.join(PROGRAMS)}")
        print(build(program))


if __name__ == "__main__":
    main()
