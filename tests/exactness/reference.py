"""Runs the native test programs: zoo makes models, oracle computes with stock llama.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests"
PROGRAMS_ENV = "MOESHARD_TEST_PROGRAMS"

Tokens = npt.NDArray[np.int32]
Keep = npt.NDArray[np.bool_]


def programs() -> Path:
    """Return the folder with zoo and oracle, building them where no build has them yet."""
    given = os.environ.get(PROGRAMS_ENV)
    if given:
        return Path(given)
    # An installation with MOESHARD_TESTS=ON builds them in a folder named after the Python it is for.
    built = sorted((ROOT / "build").glob("*/tests/native/oracle"), key=lambda path: path.stat().st_mtime)
    if built:
        return built[-1].parent
    options = ["-DMOESHARD_TESTS=ON", "-DMOESHARD_PYTHON=OFF"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *generator, *options], check=True)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "--target", "zoo", "oracle"], check=True)
    return BUILD / "tests" / "native"


def stock_tree(folder: Path) -> Path:
    """Return the untouched llama.cpp tree that the programs in `folder` were built from."""
    return folder.parents[1] / "stock"


def make_model(folder: Path, name: str, out: Path, experts: str | None = None) -> int:
    """Write the specimen; return zoo's exit code (3: the architecture has no experts).

    `experts`: the type of the expert tensors, as ggml calls it, instead of the specimen's own.
    """
    more = ["--experts", experts] if experts else []
    return subprocess.run([folder / "zoo", name, out, *more], capture_output=True).returncode


@dataclass(frozen=True)
class Run:
    """One sequence of a batch."""

    tokens: Tokens
    keep: Keep | None = None


@dataclass(frozen=True)
class Reference:
    """What stock llama.cpp computed. Tokens of several sequences follow each other; layers are the outermost axis."""

    logits: npt.NDArray[np.float32]
    layers: tuple[int, ...]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float32]


def stock(
    folder: Path,
    model: Path,
    sequences: Sequence[Run],
    *,
    ubatch: int = 512,
    ctx: int = 0,
    threads: int = 2,
    watch: bool = True,
    single: bool = False,
) -> Reference:
    """Compute in stock llama.cpp. Without `watch`, and without keeps, no callback is installed and nothing traced.

    `single`: attention in single precision, which llama.cpp by default rounds to half.
    """
    with tempfile.TemporaryDirectory(prefix="moeshard-oracle-") as tmp:
        where = Path(tmp)
        command: list[str | Path] = [folder / "oracle", model, "--out", where]
        command += ["--ubatch", str(ubatch), "--ctx", str(ctx), "--threads", str(threads)]
        for i, sequence in enumerate(sequences):
            spec = where / f"{i}.tokens"
            sequence.tokens.astype(np.int32).tofile(spec)
            argument = str(spec)
            if sequence.keep is not None:
                sequence.keep.astype(np.uint8).tofile(where / f"{i}.keep")
                argument += f":{where / f'{i}.keep'}"
            command += ["--seq", argument]
        if watch:
            command += ["--watch", "--norms"]
        if single:
            command += ["--single"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"oracle failed on {model.name}:\n{done.stderr}")
        return read(where, sum(len(sequence.tokens) for sequence in sequences))


def read(where: Path, n_tokens: int) -> Reference:
    def floats(name: str, *shape: int) -> npt.NDArray[np.float32]:
        path = where / f"{name}.f32"
        return np.fromfile(path, np.float32).reshape(shape) if path.exists() else np.empty(0, np.float32)

    def integers(name: str, *shape: int) -> npt.NDArray[np.int32]:
        path = where / f"{name}.i32"
        return np.fromfile(path, np.int32).reshape(shape) if path.exists() else np.empty(0, np.int32)

    layers = tuple(integers("layers", -1).tolist())
    shape = (len(layers), n_tokens, -1)
    return Reference(
        floats("logits", n_tokens, -1),
        layers,
        integers("ids", *shape),
        floats("weights", *shape),
        floats("probs", *shape),
        floats("norms", *shape),
    )
