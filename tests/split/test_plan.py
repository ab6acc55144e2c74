"""Plan files: written, read back, kept whole, and refused with the place that is wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshard import MoeshardError
from moeshard.gguf.identity import ModelIdentity
from moeshard.keep.text import Keep
from moeshard.planning.plan import Plan, PlanNode, read_plan

MODEL = ModelIdentity(
    name="Tiny é", arch="qwen3moe", fingerprint="sha256:00ff", n_layer=4, n_expert=8, moe_layers=[1, 3]
)

GOOD: dict[str, Any] = {
    "moeshard_plan": 1,
    "model": {
        "name": "Tiny é",
        "arch": "qwen3moe",
        "fingerprint": "sha256:00ff",
        "n_layer": 4,
        "n_expert": 8,
        "moe_layers": [1, 3],
        "bytes": 5,
    },
    "strategy": "snake",
    "parameters": {"groups": 2, "replicate": None},
    "nodes": [
        {
            "name": "node-0",
            "n_expert_used": 3,
            "keep": {"1": "0-2,7", "3": "all"},
            "bytes": 100,
            "captured": {"en": 0.5},
        },
        {"name": "_n.1", "keep": {"3": "none", "1": " 4 6 "}},
    ],
    "planner": {"version": "9"},
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """Return the good plan with one value replaced."""
    document = copy.deepcopy(GOOD)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return document


def without(*path: Any) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return document


def read(tmp_path: Path, data: Any) -> Plan:
    path = tmp_path / "plan.json"
    if not isinstance(data, (bytes, str)):
        data = json.dumps(data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_plan(path)


def keep_of(**rows: list[int]) -> Keep:
    keep = np.ones((4, 8), dtype=bool)
    for layer, ids in rows.items():
        keep[int(layer[1:])] = np.isin(np.arange(8), ids)
    return keep


def plan(**options: Any) -> Plan:
    good: dict[str, Any] = {
        "nodes": [PlanNode("a", keep_of(l1=[0, 1, 5])), PlanNode("b", keep_of(), n_expert_used=4, facts={"bytes": 7})],
        "strategy": "balanced",
        "parameters": {"groups": 2},
        "model": MODEL,
    }
    return Plan(**good | options)


def test_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.model == MODEL
    assert found.model.facts == {"bytes": 5}
    assert (found.strategy, found.parameters) == ("snake", {"groups": 2, "replicate": None})
    assert found.extra == {"planner": {"version": "9"}}
    first, second = found.nodes
    assert (first.name, first.n_expert_used) == ("node-0", 3)
    assert first.facts == {"bytes": 100, "captured": {"en": 0.5}}
    assert np.array_equal(first.keep, keep_of(l1=[0, 1, 2, 7]))
    assert (second.name, second.n_expert_used, second.facts) == ("_n.1", None, {})
    assert np.array_equal(second.keep, keep_of(l1=[4, 6], l3=[]))


def test_byte_order_mark_and_null(tmp_path: Path) -> None:
    text = json.dumps(changed("nodes", 0, "n_expert_used", to=None))
    assert read(tmp_path, "\ufeff" + text).nodes[0].n_expert_used is None


def test_nothing_is_lost_when_written_again(tmp_path: Path) -> None:
    first = read(tmp_path, GOOD)
    text = first.to_json()
    expected = changed("nodes", 1, "keep", to={"1": "4,6", "3": "none"})
    assert json.loads(text) == expected
    assert list(json.loads(text)) == list(GOOD)
    assert text.endswith("}\n")
    assert '\n  "strategy": "snake"' in text
    assert read(tmp_path, text).to_json() == text


def test_write(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().write(path)
    assert read_plan(path).to_json() == plan().to_json()
    with pytest.raises(MoeshardError, match="plan.json: exists already.*--force"):
        plan(strategy="other").write(path)
    plan(strategy="other").write(path, force=True)
    assert read_plan(path).strategy == "other"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FACTS = st.dictionaries(st.text().map(lambda text: f"x{text}"), JSON_VALUES, max_size=2)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    n_layer, n_expert = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    moe_layers = sorted(data.draw(st.sets(st.integers(0, n_layer - 1), min_size=1)))
    nodes = []
    for index in range(data.draw(st.integers(1, 3))):
        bits = data.draw(st.lists(st.booleans(), min_size=n_layer * n_expert, max_size=n_layer * n_expert))
        keep = np.array(bits).reshape(n_layer, n_expert)
        fewest = int(keep[moe_layers].sum(axis=1).min())
        used = data.draw(st.none() | st.integers(1, fewest)) if fewest else None
        nodes.append(PlanNode(f"node{index}", keep, used, data.draw(FACTS)))
    model = ModelIdentity(
        data.draw(st.text()), "arch", data.draw(st.text()), n_layer, n_expert, moe_layers, data.draw(FACTS)
    )
    made = Plan(nodes, data.draw(st.text()), data.draw(FACTS), model, data.draw(FACTS))

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made.write(path)
    found = read_plan(path)
    assert found.to_json() == made.to_json()
    assert (found.model, found.model.facts, found.extra) == (model, model.facts, made.extra)
    for node, original in zip(found.nodes, nodes, strict=True):
        assert (node.name, node.n_expert_used, node.facts) == (original.name, original.n_expert_used, original.facts)
        assert np.array_equal(node.keep[moe_layers], original.keep[moe_layers])
        assert node.keep[sorted(set(range(n_layer)) - set(moe_layers))].all()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", ["not JSON", "line 1"]),
        (json.dumps(GOOD)[:-20], ["not JSON", "line 1"]),
        (b'{"moeshard_plan": 1, \xff}', ["not text", "UTF-8"]),
        (json.dumps(GOOD).encode("utf-16"), ["not text"]),
        ("[" * 100_000, ["nested"]),
        ('{"a":' * 100_000, ["nested"]),
        ('{"moeshard_plan": ' + "1" * 10_000 + "}", ["not JSON", "digits"]),
        (json.dumps(changed("parameters", "x", to=float("nan"))), ["NaN", "finite"]),
        (json.dumps(changed("parameters", "x", to=float("-inf"))), ["-Infinity", "finite"]),
        (json.dumps(GOOD).replace("0.5", "1e999"), ["1e999", "finite"]),
        (json.dumps(GOOD).replace('"3": "all"', '"1": "all"'), ["'1' stands twice"]),
        ([], ["the file: expected an object, got a list"]),
        (3, ["the file: expected an object, got an integer"]),
        ({}, ["no plan", "moeshard_plan"]),
        (changed("moeshard_plan", to=2), ["moeshard_plan", "version 2", "update moeshard"]),
        (changed("moeshard_plan", to=0), ["version 0", "make the file again"]),
        (changed("moeshard_plan", to=True), ["moeshard_plan: expected an integer, got true or false"]),
        (changed("moeshard_plan", to="1"), ["moeshard_plan: expected an integer, got a text"]),
        (without("model"), ["model: is missing"]),
        (without("strategy"), ["strategy: is missing"]),
        (without("parameters"), ["parameters: is missing"]),
        (without("nodes"), ["nodes: is missing"]),
        (changed("model", to=None), ["model: expected an object, got null"]),
        (changed("strategy", to=1.5), ["strategy: expected a text, got a number"]),
        (changed("parameters", to=[]), ["parameters: expected an object, got a list"]),
        (changed("nodes", to={}), ["nodes: expected a list, got an object"]),
        (changed("nodes", to=[]), ["nodes: a plan needs at least one"]),
        *((without("model", key), [f"model.{key}: is missing"]) for key in GOOD["model"] if key != "bytes"),
        (changed("model", "name", to=None), ["model.name: expected a text, got null"]),
        (changed("model", "arch", to=1), ["model.arch: expected a text"]),
        (changed("model", "fingerprint", to=1), ["model.fingerprint: expected a text"]),
        (changed("model", "n_layer", to=True), ["model.n_layer: expected an integer, got true or false"]),
        (changed("model", "n_layer", to=4.0), ["model.n_layer: expected an integer, got a number"]),
        (changed("model", "n_layer", to=0), ["model.n_layer: 0 is less than 1"]),
        (changed("model", "n_expert", to=-8), ["model.n_expert: -8 is less than 1"]),
        (changed("model", "n_expert", to=10**12), ["model.n_expert", "more than any model"]),
        (changed("model", "n_layer", to=10**400), ["model.n_expert", "more than any model"]),
        (changed("model", "moe_layers", to="1,3"), ["model.moe_layers: expected a list"]),
        (changed("model", "moe_layers", to=[]), ["model.moe_layers: is empty"]),
        (changed("model", "moe_layers", to=[1, "3"]), ["model.moe_layers[1]: expected an integer, got a text"]),
        (changed("model", "moe_layers", to=[1, True]), ["model.moe_layers[1]: expected an integer, got true"]),
        (changed("model", "moe_layers", to=[3, 1]), ["model.moe_layers", "ascending", "0 to 3"]),
        (changed("model", "moe_layers", to=[1, 1]), ["model.moe_layers", "each once"]),
        (changed("model", "moe_layers", to=[1, 4]), ["model.moe_layers", "0 to 3"]),
        (changed("model", "moe_layers", to=[-1, 3]), ["model.moe_layers", "0 to 3"]),
        (changed("nodes", 1, to="node"), ["nodes[1]: expected an object, got a text"]),
        (without("nodes", 1, "name"), ["nodes[1].name: is missing"]),
        (without("nodes", 1, "keep"), ["nodes[1].keep: is missing"]),
        (changed("nodes", 1, "name", to=5), ["nodes[1].name: expected a text"]),
        *(
            (changed("nodes", 1, "name", to=name), [f"nodes[1].name: '{name}' cannot be part of a file name"])
            for name in ("", ".hidden", "..", "a/b", "a\\b", "a b", "a\n", "é", "a\0")
        ),
        (changed("nodes", 1, "name", to="node-0"), ["nodes[1].name", "name of nodes[0] too"]),
        (changed("nodes", 1, "name", to="NODE-0"), ["nodes[1].name", "name of nodes[0] too", "case"]),
        (changed("nodes", 0, "n_expert_used", to=True), ["nodes[0].n_expert_used: expected an integer"]),
        (changed("nodes", 0, "n_expert_used", to=2.0), ["nodes[0].n_expert_used: expected an integer"]),
        (changed("nodes", 0, "n_expert_used", to=0), ["nodes[0].n_expert_used", "use 0 experts", "at least 1"]),
        (changed("nodes", 0, "n_expert_used", to=5), ["nodes[0].n_expert_used", "use 5 experts", "holds 4"]),
        (changed("nodes", 1, "keep", to=[]), ["nodes[1].keep: expected an object"]),
        (changed("nodes", 1, "keep", to={}), ["nodes[1].keep: nothing is said for layers 1,3", '"1": "all"']),
        (without("nodes", 1, "keep", "3"), ["nodes[1].keep: nothing is said for layer 3"]),
        *(
            (changed("nodes", 1, "keep", key, to="all"), [f'nodes[1].keep["{key}"]', "not one of the layers", "1,3"])
            for key in ("0", "4", "-1", "01", "", "x", "1 ", "³", "9" * 5000)
        ),
        (changed("nodes", 1, "keep", "3", to=None), ['nodes[1].keep["3"]: expected a text, got null']),
        (changed("nodes", 1, "keep", "3", to=[1]), ['nodes[1].keep["3"]: expected a text, got a list']),
        (changed("nodes", 1, "keep", "3", to=""), ['nodes[1].keep["3"]: nothing given']),
        (changed("nodes", 1, "keep", "3", to="0-8"), ["nodes[1].keep[\"3\"]: '0-8' is out of range", "0 to 7"]),
        (changed("nodes", 1, "keep", "3", to="3-1"), ['nodes[1].keep["3"]', "runs backwards"]),
        (changed("nodes", 1, "keep", "3", to="@/etc/hostname"), ['nodes[1].keep["3"]', "is not an expert"]),
        (changed("nodes", 1, "keep", "3", to="1\n3: 2"), ['nodes[1].keep["3"]', "'3:' is not an expert"]),
    ],
)
def test_errors_name_file_and_place(tmp_path: Path, document: Any, said: list[str]) -> None:
    with pytest.raises(MoeshardError) as error:
        read(tmp_path, document)
    for part in (str(tmp_path / "plan.json"), *said):
        assert part in str(error.value)


@pytest.mark.parametrize(("path", "said"), [("missing", "No such file"), (".", "directory"), ("a\0b", "null")])
def test_unreadable(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(MoeshardError, match=f"cannot read plan .*{said}"):
        read_plan(f"{tmp_path}/{path}")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key in keys for place in places(value[key], (*path, key))]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(places(GOOD)),
    st.sampled_from([None, True, -1, 0, 2**70, 0.5, "", "all", [], [[]], [1], {}, {"1": "all"}, {"keep": []}]),
)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: Any
) -> None:
    path = tmp_path_factory.mktemp("any")
    with contextlib.suppress(MoeshardError):
        read(path, changed(*place, to=value))
    with contextlib.suppress(MoeshardError):
        read(path, without(*place))


def test_any_damage_is_read_or_refused(tmp_path: Path) -> None:
    whole = json.dumps(GOOD).encode()
    for index in range(0, len(whole), 3):
        for data in (whole[:index], whole[:index] + b"\x93" + whole[index + 1 :]):
            with pytest.raises(MoeshardError):
                read(tmp_path, data)
        with contextlib.suppress(MoeshardError):
            read(tmp_path, whole[:index] + b"1" + whole[index + 1 :])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": []}, "nodes: a plan needs at least one"),
        ({"nodes": [PlanNode("../a", keep_of())]}, r"nodes\[0\].name: '../a' cannot be part"),
        ({"nodes": [PlanNode("a", keep_of()), PlanNode("A", keep_of())]}, r"nodes\[1\].name"),
        ({"nodes": [PlanNode("a", keep_of()[1:])]}, r"nodes\[0\].keep: must be a bool array \(4, 8\).*\(3, 8\)"),
        ({"nodes": [PlanNode("a", keep_of().astype(int))]}, r"nodes\[0\].keep: .* int"),
        ({"nodes": [PlanNode("a", keep_of(l3=[]), n_expert_used=1)]}, r"nodes\[0\].n_expert_used"),
        ({"nodes": [PlanNode("a", keep_of(), facts={"keep": 1})]}, r"nodes\[0\].facts: 'keep' has its own place"),
        ({"model": dataclasses.replace(MODEL, facts={"arch": 1})}, "model.facts: 'arch' has its own place"),
        ({"extra": {"nodes": 1}}, "extra: 'nodes' has its own place"),
    ],
)
def test_errors_of_plans_made_in_python(options: dict[str, Any], said: str) -> None:
    assert plan().nodes
    with pytest.raises(MoeshardError, match=said):
        plan(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1), b"bytes", {(1, 2): 3}])
def test_what_json_has_no_word_for_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(MoeshardError, match="cannot write the plan as JSON: .*plain values"):
        plan(parameters={"x": value}).write(tmp_path / "plan.json")
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(MoeshardError, match="cannot write the plan as JSON"):
        plan(extra={"x": nested}).write(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_is_for_one_model() -> None:
    plan().check(MODEL)
    plan().check(dataclasses.replace(MODEL, name="renamed", facts={"bytes": 1}))
    for change in (
        {"fingerprint": "sha256:11aa"},
        {"n_layer": 5},
        {"n_expert": 16},
        {"moe_layers": [1, 2, 3]},
    ):
        other = dataclasses.replace(MODEL, name="Other", **change)
        with pytest.raises(MoeshardError) as error:
            plan().check(other)
        for part in ("'Tiny é'", "'Other'", *(str(value) for value in change.values() if isinstance(value, str))):
            assert part in str(error.value)
