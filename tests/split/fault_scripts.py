"""Processes that something happens to, and a model that takes a while to copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shard_files import small_source

PRELUDE = """
import os, resource, sys
import moeshard
from moeshard import GGUFMap, MoeshardError, _core

def attempt(what, *arguments, **options):
    try:
        what(*arguments, **options)
    except MoeshardError as error:
        print("refused:", error)
    else:
        print("done")
"""


def run(script: str, *arguments: object, within: tuple[str, ...] = ()) -> list[str]:
    """Run a script in a process of its own, which must end by itself; return what it printed."""
    command = [*within, sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return done.stdout.splitlines()


def sizeable_model(path: Path, n_bytes: int, hole: bool = False) -> Path:
    """Write one layer of 64 experts, almost all of it one tensor; with `hole` that is zeros which are not stored."""
    source = small_source(n_layer=1, n_expert=64)
    del source.gguf.tensors[3:]
    up = source.gguf.tensors[2]
    assert up.name == b"blk.0.ffn_up_exps.weight"
    up.ne = (32, n_bytes // (4 * 32 * 64), 64)
    with path.open("wb") as file:
        for piece in (source.gguf.header(), *(tensor.data for tensor in source.gguf.tensors[:2])):
            file.write(piece + bytes(-len(piece) % 32))
        if hole:
            file.truncate(file.tell() + n_bytes)
        else:
            block = os.urandom(1 << 20)
            for _ in range(n_bytes >> 20):
                file.write(block)
    return path
