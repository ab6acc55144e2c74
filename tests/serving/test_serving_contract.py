"""Whatever a request holds, the answer is one that the server's own OpenAPI document allows."""

from __future__ import annotations

import pytest
import schemathesis
from conftest import Application
from hypothesis import HealthCheck, Phase, settings
from running import Running
from schemathesis.core.failures import FailureGroup

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/nodes"),
    ("GET", "/props"),
    ("GET", "/health"),
    ("GET", "/live"),
    ("GET", "/metrics"),
    ("GET", "/"),
]


@pytest.fixture(scope="module")
def schema(server: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")
