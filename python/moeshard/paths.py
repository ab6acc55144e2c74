"""Where the installed package keeps what C++ programs build against."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def _root() -> Path:
    # In an editable install the Python files lie in the source tree and everything native beside the extension module.
    spec = find_spec("moeshard._core")
    if spec is None or spec.origin is None:
        raise ImportError("moeshard._core is not installed")
    return Path(spec.origin).parent


def cmake_dir() -> Path:
    """Return the folder of moeshard's CMake package; pass it as ``-Dmoeshard_DIR=``."""
    return _root() / "lib" / "cmake" / "moeshard"


def include_dir() -> Path:
    """Return the folder to include ``moeshard/*.hpp`` from."""
    return _root() / "include"
