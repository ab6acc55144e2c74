"""Damaged numbers in a model's header end in an error or a working model, never in a dead process."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeshard

SOURCE = Path(moeshard.embedded_model())

# What the child does with each damaged copy: exit 0 (finite logits), 1 (MoeshardError), else a failure.
CHILD = """
import sys
import numpy as np
import moeshard
try:
    logits = moeshard.Model(sys.argv[1], n_ctx=256, n_threads=1).logits(np.arange(20))
except moeshard.MoeshardError as error:
    print(error)
    sys.exit(1)
sys.exit(0 if np.isfinite(logits).all() else 3)
"""

INTEGERS = [struct.pack("<I", value) for value in (0, 3, 1 << 31, 0xFFFFFFFF)]
FLOATS = [struct.pack("<f", value) for value in (0.0, -1.0, float("nan"), float("inf"))]
UINT32, FLOAT32 = 4, 6


def damages() -> list[tuple[str, int, bytes]]:
    """Every (key, offset in the file, replacement) for the scalar numbers of the embedded model."""
    data = SOURCE.read_bytes()
    model = moeshard.GGUFMap(SOURCE)
    found = []
    for key, where in model.parts[0].entry_ranges.items():
        if isinstance(model.metadata[key], (list, np.ndarray)):
            continue
        at = where[0] + 8 + len(key.encode())
        kind = struct.unpack_from("<I", data, at)[0]
        values = INTEGERS if kind == UINT32 else FLOATS if kind == FLOAT32 else []
        found += [(key, at + 4, value) for value in values]
    return found


def test_there_are_numbers_to_damage() -> None:
    keys = {key for key, _, _ in damages()}
    assert {"qwen3moe.expert_count", "qwen3moe.attention.layer_norm_rms_epsilon", "qwen3moe.block_count"} <= keys


@pytest.mark.parametrize(("key", "offset", "value"), damages(), ids=[f"{d[0]}-{d[2].hex()}" for d in damages()])
def test_damaged_number(key: str, offset: int, value: bytes, tmp_path: Path) -> None:
    data = bytearray(SOURCE.read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), f"{key}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    if done.returncode == 1:
        assert str(path) in done.stdout, "the error names the file"
