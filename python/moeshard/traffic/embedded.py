"""The model and the texts inside the package, so that a first try needs no download.

The model is ``data/tinymoe.gguf``. Texts come per domain (``en``, ``py``, …): ``heldout`` to score on and
``calibration`` to choose experts with. A domain without a calibration text of its own gives the first half of its
held-out text for that and keeps the second for scoring, so that nothing is ever scored that was used to choose.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from moeshard._core import MoeshardError

MODEL_NAME = "tinymoe"

Part = Literal["calibration", "heldout"]


def embedded_model() -> Path:
    """Return the path of the embedded model, a GGUF file.

    Raises:
        MoeshardError: the installation lacks it.
    """
    return _existing(_data() / "tinymoe.gguf")


def resolve_model(name: str) -> Path:
    """Return the path that a MODEL argument means: the embedded model for ``tinymoe``, else the path itself."""
    return embedded_model() if name == MODEL_NAME else Path(name)


def model_name(path: str | os.PathLike[str]) -> str:
    """Return what `resolve_model` finds this model by again, from any folder: ``tinymoe``, else the absolute path."""
    embedded = _data() / "tinymoe.gguf"
    same = embedded.is_file() and os.path.exists(path) and embedded.samefile(path)
    return MODEL_NAME if same else os.path.abspath(path)


def embedded_domains() -> list[str]:
    """Return the names of the domains that have a held-out text, sorted."""
    return sorted(path.stem for path in (_data() / "heldout").glob("*.txt"))


def embedded_text(domain: str, part: Part = "heldout") -> str:
    """Return an embedded text; the two parts of a domain never overlap.

    Raises:
        MoeshardError: there is no such domain.
    """
    path = _data() / "heldout" / f"{domain}.txt"
    if domain not in embedded_domains():
        raise MoeshardError(f"there is no embedded text '{domain}'; choose from: {', '.join(embedded_domains())}")
    calibration = _data() / "calibration" / path.name
    if calibration.is_file():
        return _read(calibration if part == "calibration" else path)
    text = _read(path)
    middle = text.find("\n", len(text) // 2) + 1
    return text[:middle] if part == "calibration" else text[middle:]


def _data() -> Path:
    # Not importlib.resources: in an editable install it gives no path that could be handed to the native reader.
    return Path(__file__).parent.parent / "data"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MoeshardError(f"this installation of moeshard is incomplete: {path} is missing; install it again")
    return path


def _read(path: Path) -> str:
    # The texts are cut at a number of bytes, which may fall inside a character.
    return _existing(path).read_bytes().decode("utf-8", errors="ignore")
