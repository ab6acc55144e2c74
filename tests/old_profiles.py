"""Profiles as older versions of moeshard wrote them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from moeshard.gguf.identity import model_to_json
from moeshard.profile.record import Profile

ARRAYS = tuple(f.name for f in fields(Profile) if f.name not in ("model", "domains", "facts"))


def old_file(path: Path, profile: Profile, version: int) -> None:
    """Write a profile as moeshard did when that was the version."""
    head = {
        "moeshard_profile": version,
        "model": model_to_json(profile.model),
        "domains": profile.domains,
        "facts": profile.facts,
    }
    arrays = {name: np.asarray(getattr(profile, name)) for name in ARRAYS}
    arrays["saliency_by_sequence"] = arrays.pop("saliency")
    if version == 1:
        del arrays["energy"], arrays["cosaliency"]
    np.savez_compressed(path, head=np.array(json.dumps(head)), saliency=profile.ranking(), **arrays)
