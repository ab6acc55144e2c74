"""Whatever a request holds, the answer is one that the server's own OpenAPI document allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from conftest import Application
from hypothesis import HealthCheck, Phase, given, settings
from running import Running
from schemathesis import GenerationMode

OPERATIONS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/embeddings": "POST",
    "/moeshard/losses": "POST",
    "/moeshard/render": "POST",
    "/v1/models": "GET",
    "/v1/models/{name}": "GET",
    "/nodes": "GET",
    "/props": "GET",
    "/health": "GET",
    "/live": "GET",
    "/metrics": "GET",
    "/": "GET",
}


@pytest.fixture(scope="module")
def described(application: Application) -> Iterator[Any]:
    running = Running(lambda: application()[0])
    yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    running.stop()


def test_all_operations_are_here(described: Any) -> None:
    found = {result.ok().path: result.ok().method.upper() for result in described.get_all_operations()}
    assert found == OPERATIONS


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", OPERATIONS)
def test_answers_are_as_described(described: Any, path: str, mode: GenerationMode) -> None:
    method = OPERATIONS[path]
    if method == "GET" and "{" not in path and mode == GenerationMode.NEGATIVE:
        return  # nothing in it could be wrong

    @given(case=described[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=30 if method == "POST" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode == GenerationMode.POSITIVE and "completions" in path:
            case.body = {**case.body, "max_tokens": 2}  # what is said at length is said alike
            case.body.pop("max_completion_tokens", None)
            case.body.pop("logit_bias", None)  # for tokens that there are not
            if case.body.get("top_logprobs"):
                case.body["logprobs"] = True
        excluded = [schemathesis.checks.not_a_server_error] if path == "/v1/embeddings" else []  # it is 501
        case.call_and_validate(timeout=60, excluded_checks=excluded)

    check()
