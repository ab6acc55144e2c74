"""`moeshard generate`: text from a model, with all experts or some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeshard.cli.options import (
    ChatTemplateOption,
    GpuLayersOption,
    JsonOption,
    ModelArgument,
    RpcOption,
    SplitOption,
    ThreadsOption,
    pipeline,
)
from moeshard.cli.prompts import ChatOption, PromptFileOption, PromptOption, SystemOption, apply_template, read_prompt
from moeshard.runtime.limits import MAX_SEED

if TYPE_CHECKING:
    from moeshard.keep.text import Keep
    from moeshard.runtime.generation import Generation
    from moeshard.runtime.model import Model


def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    file: PromptFileOption = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="The experts to use: a list for every layer such as '0-63,70', or a file with a line per layer."
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-n", min=-1, help="Stop after so many tokens; -1: when the context is full."),
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens with this probability; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens less likely than this part of the likeliest; 0: none.")
    ] = 0.05,
    repeat_penalty: Annotated[
        float, typer.Option(min=0.01, help="Divide the scores of recent tokens by this; 1: off.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, show_default="random", help="For the same text again.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    chat_template: ChatTemplateOption = None,
    threads: ThreadsOption = 0,
    ctx: Annotated[
        int | None,
        typer.Option(min=1, show_default="the model's, at most 4096", help="Tokens of context."),
    ] = None,
    gpu_layers: GpuLayersOption = -1,
    rpc: RpcOption = None,
    split: SplitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text, as it comes, with all experts or only those of --keep.

    The text goes to stdout, speed and seed to stderr.
    """
    text = read_prompt(prompt, file, chat, system, chat_template)

    from random import SystemRandom

    from moeshard.cli.loading import load_model

    seed = SystemRandom().randrange(MAX_SEED) if seed is None else seed
    loaded = load_model(model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers, workers=pipeline(rpc, split))
    mask = None if keep is None else loaded.keep(keep)
    text, read_as = apply_template(loaded, text, chat, system, chat_template)
    answer = loaded.generate(
        read_as,
        mask,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        stop=stop or (),
    )
    if as_json:
        from moeshard.cli.terminal import print_json

        answer_text = "".join(answer)
        print_json({"model": loaded.path, "prompt": text, "text": answer_text, **_facts(answer, loaded, mask, seed)})
    else:
        _stream(answer)
        _report(answer, loaded, mask, seed)


def _stream(answer: Generation) -> None:
    from moeshard.cli.terminal import pour

    piece = ""
    for piece in answer:
        pour(piece)
    if not piece.endswith("\n"):
        pour("\n")


def _facts(answer: Generation, model: Model, mask: Keep | None, seed: int) -> dict[str, Any]:
    """What is worth knowing about a finished answer."""
    counts = model.routing.expert_counts
    held = None if mask is None else [int(mask[layer, : counts[layer]].sum()) for layer in model.moe_layers]
    return {
        "prompt_tokens": len(answer.prompt_tokens),
        "tokens": answer.tokens.tolist(),
        "stop_reason": answer.stop_reason,
        "prompt_tokens_per_second": answer.prompt_tokens_per_second,
        "tokens_per_second": answer.tokens_per_second,
        "seed": seed,
        "n_expert": model.n_expert,
        "experts_held": held,
    }


def _report(answer: Generation, model: Model, mask: Keep | None, seed: int) -> None:
    """Write the statistics in one line on stderr."""
    from moeshard.cli.output import span
    from moeshard.cli.terminal import note

    facts = _facts(answer, model, mask, seed)
    parts = [
        f"prompt {facts['prompt_tokens']} tokens, {facts['prompt_tokens_per_second']:.0f} tokens/s",
        f"answer {len(facts['tokens'])} tokens, {facts['tokens_per_second']:.1f} tokens/s ({facts['stop_reason']})",
        f"seed {seed}",
    ]
    held = facts["experts_held"]
    if held:
        parts.append(f"{span(min(held), max(held))} of {model.n_expert} experts per layer")
    note(" · ".join(parts))
