"""What serving needs beyond the package's own dependencies."""

from __future__ import annotations

from importlib.util import find_spec

from moeshard._core import MoeshardError

MODULES = ("starlette", "uvicorn", "httpx", "prometheus_client")


def require_serving() -> None:
    """Raise a `MoeshardError` that says what to install where something is missing."""
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise MoeshardError(f"serving needs {', '.join(missing)}: pip install 'moeshard[serve]'")
