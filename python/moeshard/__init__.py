"""moeshard: know which experts of a Mixture-of-Experts model your traffic needs, and run it with only those.

>>> import moeshard
>>> model = moeshard.Model(moeshard.embedded_model())
>>> keep = model.keep("0-63")  # bool (n_layer, n_expert)
>>> print("".join(model.generate("Once upon a time", keep=keep)))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Names are looked up when first used: `import moeshard` costs next to nothing, and a command line that only prints its
# help never loads the native library.
_HOME = {
    "GGUFMap": "moeshard._core",
    "Generation": "moeshard.generation",
    "Model": "moeshard.model",
    "MoeshardError": "moeshard._core",
    "Session": "moeshard.session",
    "Trace": "moeshard.trace",
    "TraceChunk": "moeshard.trace",
    "cmake_dir": "moeshard.paths",
    "embedded_model": "moeshard.embedded",
    "embedded_text": "moeshard.embedded",
    "format_keep": "moeshard.keep",
    "include_dir": "moeshard.paths",
    "parse_keep": "moeshard.keep",
}

if TYPE_CHECKING:
    from moeshard._core import GGUFMap, MoeshardError
    from moeshard.embedded import embedded_model, embedded_text
    from moeshard.generation import Generation
    from moeshard.keep import format_keep, parse_keep
    from moeshard.model import Model
    from moeshard.paths import cmake_dir, include_dir
    from moeshard.session import Session
    from moeshard.trace import Trace, TraceChunk

__all__ = [
    "GGUFMap",
    "Generation",
    "Model",
    "MoeshardError",
    "Session",
    "Trace",
    "TraceChunk",
    "__version__",
    "cmake_dir",
    "embedded_model",
    "embedded_text",
    "format_keep",
    "include_dir",
    "parse_keep",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("moeshard")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moeshard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
