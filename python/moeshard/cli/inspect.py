"""`moeshard inspect`: what a file says about its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeshard.cli.options import JsonOption, ModelArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from moeshard.gguf.inspection import ExpertTensorInfo, Inspection

LABEL_WIDTH = 16


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show architecture, routing and sizes of a model, from its header alone.

    Sizes are of tensor data; the trunk is everything that is not routed experts.
    """
    from moeshard.cli.output import show
    from moeshard.cli.terminal import print_json, printable, say
    from moeshard.gguf.inspection import inspect_model
    from moeshard.traffic.embedded import resolve_model

    found = inspect_model(resolve_model(model))
    if as_json:
        print_json(found.to_dict())
        return
    for name, value in _facts(found):
        say(name.ljust(LABEL_WIDTH), bold=True, nl=False)
        say(printable(value))
    if found.expert_tensors:
        say()
        show(_tensors(found))


def _facts(found: Inspection) -> list[tuple[str, str]]:
    """The lines of the summary: name and value."""
    from moeshard.sizes import size

    parts = f" in {len(found.parts)} files" if len(found.parts) > 1 else ""
    types = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in found.type_bytes.items())
    nextn = f", {found.n_layer_nextn} of them to predict further tokens" if found.n_layer_nextn else ""
    facts = [
        ("file", f"{found.path} ({size(found.file_bytes)}{parts})"),
        ("model", f"{found.name or 'unnamed'}, {_count(found.n_params)} parameters"),
        ("architecture", found.arch),
        ("tensors", types),
        ("layers", f"{found.n_layer}{nextn}"),
    ]
    if found.n_ctx_train:
        facts.append(("context", f"{found.n_ctx_train} tokens in training"))
    if found.n_expert == 0:
        return [*facts, ("experts", "none: a dense model"), ("trunk weights", size(found.trunk_bytes))]
    if not found.moe_layers:
        held = f"none in this file, which is part of a model with {found.n_expert} per layer"
        return [*facts, ("experts", held), ("trunk weights", size(found.trunk_bytes))]
    whole = found.trunk_bytes + found.expert_bytes
    return [
        *facts,
        ("MoE layers", f"{len(found.moe_layers)}: {_runs(found.moe_layers)}"),
        ("experts", _experts(found)),
        ("routing", _routing(found)),
        ("trunk weights", f"{size(found.trunk_bytes)} ({found.trunk_bytes / whole:.1%})"),
        ("expert weights", f"{size(found.expert_bytes)} ({found.expert_bytes / whole:.1%})"),
        ("one expert", f"{_span([found.per_expert_bytes[layer] for layer in found.moe_layers])} per layer"),
        ("one token", f"uses {size(found.active_bytes)} ({found.active_bytes / whole:.1%})"),
    ]


def _experts(found: Inspection) -> str:
    from moeshard.cli.output import span

    used = sorted({found.n_expert_used[layer] for layer in found.moe_layers} - {0})
    held = span(min(found.expert_counts[layer] for layer in found.moe_layers), found.n_expert)
    text = f"{held} per layer, {' or '.join(map(str, used))} per token"
    if found.n_expert_shared:
        text += f", and {found.n_expert_shared} shared (in the trunk)"
    return text


def _routing(found: Inspection) -> str:
    parts = [found.gating, "weights renormalised" if found.renormalized else "weights not renormalised"]
    if found.selection != "probs":
        parts.append(f"chosen by {found.selection}")
    if found.n_expert_groups > 1:
        parts.append(f"from the best {found.n_expert_groups_used} of {found.n_expert_groups} groups")
    if found.hash_layers:
        parts.append(f"looked up by token in layers {_runs(found.hash_layers)}")
    return ", ".join(parts)


def _tensors(found: Inspection) -> Table:
    from moeshard.cli.output import plain_table
    from moeshard.sizes import size

    table = plain_table("Tensors that depend on the experts")
    for header in ("tensor", "layers", "role", "type", "shape"):
        table.add_column(header, overflow="fold")
    for header in ("bytes", "per expert"):
        table.add_column(header, justify="right", no_wrap=True)
    alike: dict[tuple[object, ...], list[ExpertTensorInfo]] = {}
    for tensor in found.expert_tensors:
        name = tensor.name.removeprefix(f"blk.{tensor.layer}.")
        alike.setdefault((name, tensor.role, tensor.type, tensor.shape, tensor.bytes_per_expert), []).append(tensor)
    for key, tensors in alike.items():
        first = tensors[0]
        table.add_row(
            str(key[0]),
            _runs([tensor.layer for tensor in tensors]),
            first.role,
            first.type,
            ", ".join(map(str, first.shape)),
            size(sum(tensor.bytes for tensor in tensors)),
            size(first.bytes_per_expert) if first.expert_axis is not None else "",
        )
    return table


def _runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges: ``0-3,5``."""
    from moeshard.keep.text import format_ids

    return format_ids(numbers)


def _span(sizes: list[int]) -> str:
    from moeshard.sizes import size

    low, high = min(sizes), max(sizes)
    return size(low) if low == high else f"{size(low)} to {size(high)}"


def _count(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)
