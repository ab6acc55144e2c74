"""JSON schemas as grammars: what is written is valid, what is valid can be written, what cannot be said is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from running import Running
from schema_cases import CASES

import moeshard._core as _core
from moeshard import MoeshardError
from moeshard.serving.schema import schema_grammar


@pytest.fixture(scope="module")
def native(tinymoe: Any) -> _core.Model:
    return _core.Model(str(tinymoe))


def accepts(model: _core.Model, grammar: str, text: str) -> bool:
    """Whether the engine's sampler lets a model write a text, token by token, and end there."""
    sampler = _core.Sampler(model, _core.SamplingParams(temperature=0, grammar=grammar))
    end = next(token for token in range(model.n_vocab) if model.is_end_of_generation(token))
    for token in [*model.tokenize(text, False, False), end]:
        logits = np.zeros(model.n_vocab, dtype=np.float32)
        logits[token] = 100
        try:
            if sampler.sample(logits) != token:
                return False
        except MoeshardError as error:
            assert "no token fits the grammar" in str(error)
            return False
    return True


ENDLESS = ("found anywhere", "anchored by branch")
"""The model sees no reason to end the text."""
NAMES = [case[0] for case in CASES]


@pytest.mark.parametrize(("schema", "valid", "invalid"), [case[1:] for case in CASES], ids=NAMES)
def test_the_valid_can_be_written_and_the_invalid_cannot(
    native: _core.Model, schema: dict[str, Any], valid: list[Any], invalid: list[Any]
) -> None:
    grammar = schema_grammar(schema)
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for value in valid:
        assert validator.is_valid(value) or schema.get("nullable"), value  # the case itself
        for layout in ({}, {"indent": 2}, {"separators": (",", ":")}):
            text = json.dumps(value, ensure_ascii=False, **layout)
            assert accepts(native, grammar, text), text
    for value in invalid:
        assert not validator.is_valid(value), value
        assert not accepts(native, grammar, json.dumps(value, ensure_ascii=False)), value


def written(model: _core.Model, grammar: str, n: int, seed: int) -> Iterator[str]:
    """Yield what the model writes under a grammar of its own accord, where it comes to an end."""
    batcher = _core.Batcher(model, n_slots=n, n_ctx=512, n_threads=1)
    prompt = model.tokenize("The answer as JSON: ", False, False)
    texts = {}
    for i in range(n):
        sampling = _core.SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed + i, grammar=grammar)
        texts[batcher.submit(prompt, max_tokens=300, sampling=sampling)] = b""
    while steps := batcher.step():
        for step in steps:
            assert not step.error
            texts[step.id] += step.text
            if step.over and step.stop_reason == "end":
                yield texts[step.id].decode("utf-8")


@pytest.mark.parametrize(("name", "schema"), [case[:2] for case in CASES], ids=NAMES)
def test_what_a_model_writes_is_valid(native: _core.Model, name: str, schema: dict[str, Any]) -> None:
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    seen = 0
    for text in written(native, schema_grammar(schema), 6, seed=8 * NAMES.index(name)):
        value = json.loads(text)
        assert validator.is_valid(value) or (value is None and schema.get("nullable")), text
        seen += 1
    assert seen or name in ENDLESS, "nothing came to an end"


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"not": {"type": "string"}}, "#/not"),
        ({"type": "array", "items": {"if": {}, "then": {}}}, "#/items/if"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
        ({"properties": {"a": {"patternProperties": {"x": {}}}}}, "#/properties/a/patternProperties"),
        ({"type": "number", "multipleOf": 0.1}, "#/multipleOf"),
        ({"type": "object", "propertyNames": {}}, "#/propertyNames"),
        ({"type": "array", "contains": {}}, "#/contains"),
        ({"type": "string", "format": "regex"}, "#/format"),
        ({"type": "string", "pattern": "a(?=b)"}, "#/pattern: .*ahead"),
        ({"type": "string", "pattern": "(?<!a)b"}, "#/pattern: .*behind"),
        ({"type": "string", "pattern": "(a)\\1"}, "#/pattern: .*1"),
        ({"type": "string", "pattern": "a\\b"}, "#/pattern: .*b"),
        ({"type": "string", "pattern": "(a"}, "#/pattern: .*without an end"),
        ({"type": "string", "pattern": "a)"}, "#/pattern: .*unmatched"),
        ({"type": "string", "pattern": "(^a)+"}, "#/pattern: .*within"),
        ({"type": "string", "pattern": "[]"}, "#/pattern: .*no characters"),
        ({"type": "string", "pattern": "^(a|bb)*$", "maxLength": 3}, "#/pattern: .*maxLength"),
        ({"type": "string", "pattern": "^(a{0,50}){0,50}$"}, "#/pattern: .*long repetition"),
        ({"type": "string", "enum": ["a"], "minLength": 1}, "#/minLength"),
        ({"type": "text"}, "#/type"),
        ({"type": "string", "minLength": -1}, "#/minLength"),
        ({"type": "integer", "minimum": "1"}, "#/minimum"),
        ({"properties": []}, "#/properties"),
        ({"enum": []}, "#/enum"),
        ({"anyOf": []}, "#/anyOf"),
        ({"allOf": [3]}, "#/allOf/0"),
        ({"items": 3, "type": "array"}, "#/items"),
        ({"$ref": "#/$defs/x"}, r"#/\$ref"),
        ({"$ref": "https://example.com/schema"}, r"#/\$ref"),
        ({"$ref": "#"}, "refers to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: .*both 0 and 1"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "#/oneOf"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no value"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "no value"),
        ({"type": "array", "items": False, "minItems": 1}, "no value: # allows fewer items"),
        ({"required": ["a"], "properties": {"a": {"maximum": 1, "minimum": 2}}}, "no value: #/properties/a"),
        ({"type": "string", "minLength": 200_000}, "more than 100000"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "no value"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "#/minProperties"),
        ({"type": "integer", "minimum": 10**60}, "too many digits"),
    ],
)
def test_what_cannot_be_said_is_refused_by_its_place(schema: dict[str, Any], where: str) -> None:
    with pytest.raises(MoeshardError, match=where):
        schema_grammar(schema)


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def forks(n: int, combine: str) -> dict[str, Any]:
    """Return a schema in which each definition names the next one twice."""
    defs: dict[str, Any] = {f"d{i}": {combine: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "null"}}}


LARGE: dict[str, dict[str, Any]] = {
    "deep": deep(1000),
    "deeper than JSON is read": deep(20_000),
    "forks": forks(40, "anyOf"),
    "forks of all": forks(40, "allOf"),
    "repetitions": {"type": "string", "maxLength": 10**9},
    "repetitions of repetitions": {
        "type": "array",
        "items": {"type": "array", "maxItems": 90_000},
        "maxItems": 9 * 10**8,
    },
    "many lengths": {"anyOf": [{"type": "string", "maxLength": 90_000 + i} for i in range(200)]},
    "values": {"enum": [f"a long value of number {i}" for i in range(20_000)]},
    "alternatives": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(30)]},
    "pattern": {"type": "string", "pattern": "(" * 3000},
    "nested groups": {"type": "string", "pattern": "(" * 900 + "a" + ")" * 900},
    "names": {"properties": {"a" * 5000 + str(i): {} for i in range(30)}, "additionalProperties": True},
}


@pytest.mark.parametrize("name", list(LARGE))
def test_large_schemas_end_soon(native: _core.Model, name: str) -> None:
    begin = time.process_time()
    try:
        grammar = schema_grammar(LARGE[name])
    except MoeshardError:
        grammar = ""
    if grammar:
        _core.Sampler(native, _core.SamplingParams(grammar=grammar))
    assert time.process_time() - begin < 20  # without a limit: for ever, or all memory


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 100_000},
        {"type": "array", "items": {"type": "string", "minLength": 300, "maxLength": 20_000}, "maxItems": 1000},
        {"enum": [f"value {i}" for i in range(1000)]},
        {"properties": {f"property_{i}": {"type": "integer"} for i in range(200)}, "additionalProperties": True},
        deep(60),
    ],
)
def test_schemas_that_are_large_but_not_too_large_are_heeded(native: _core.Model, schema: dict[str, Any]) -> None:
    _core.Sampler(native, _core.SamplingParams(grammar=schema_grammar(schema)))


def test_a_request_with_a_schema(server: Running) -> None:
    import httpx

    def ask(**form: Any) -> httpx.Response:
        body = {"prompt": "A date: ", "max_tokens": 60, "response_format": form, "seed": 1}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
    answer = ask(type="json_schema", json_schema={"name": "x", "strict": True, "schema": schema}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert jsonschema_rs.is_valid(schema, json.loads(answer["choices"][0]["text"]), validate_formats=True)
    answer = ask(type="json_object", schema=schema).json()  # llama-server's way
    assert jsonschema_rs.is_valid(schema, json.loads(answer["choices"][0]["text"]))
    refused = ask(type="json_schema", json_schema={"schema": {"not": {}}})
    assert refused.status_code == 400
    assert "#/not" in refused.json()["error"]["message"] and refused.json()["error"]["param"] == "response_format"
