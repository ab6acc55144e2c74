"""`moeshard chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.cli.options import GpuLayersOption, ModelArgument, ThreadsOption
from moeshard.cli.serve import ContextOption, PlanOption, TemplateOption, load_local, read_template
from moeshard.runtime.limits import MAX_SEED

if TYPE_CHECKING:
    import asyncio

    from moeshard.serving.conversation import Conversation

_HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C ends an answer"


def chat(
    model: ModelArgument,
    plan: PlanOption = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Without --plan: the experts to use, such as '0-63,70', or a file with a line per layer."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-n", help="End each answer after so many tokens; -1: when the context is full."),
    ] = -1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, show_default="random", help="For the same answers again.")
    ] = None,
    ctx: ContextOption = None,
    template: TemplateOption = "",
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
) -> None:
    """Chat with a model in the terminal, by the node of a plan that serves the conversation best.

    Answers go to stdout, who answered and why to stderr. Where stdin is no terminal, each of its lines is a message.
    """
    if plan is not None and keep is not None:
        raise typer.BadParameter("--plan says which experts there are; leave out --keep")

    import asyncio

    from moeshard.serving.conversation import Conversation
    from moeshard.serving.local import LocalOptions
    from moeshard.serving.placer import Placer
    from moeshard.serving.protocol import Options

    options = LocalOptions(n_slots=1, n_ctx=ctx, template=read_template(template))
    local, nodes = load_local(model, plan, options, threads, gpu_layers, keep)
    placer = Placer([node.name for node in nodes.nodes] if nodes else [], local.prober)
    conversation = Conversation(
        local, placer, Options(max_tokens=max_tokens, temperature=temperature, seed=seed), system
    )
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(local.start())
        _talk(loop, conversation)
    finally:
        loop.run_until_complete(local.stop())
        loop.close()


def _talk(loop: asyncio.AbstractEventLoop, conversation: Conversation) -> None:
    import contextlib

    interactive = sys.stdin.isatty()
    if interactive:
        typer.secho(f"[{_HELP}]", dim=True, err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() edits lines by it
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            typer.secho(f"[{_HELP}]", dim=True, err=True)
        elif line:
            _answer(loop, conversation, line)


def _answer(loop: asyncio.AbstractEventLoop, conversation: Conversation, line: str) -> None:
    """Write an answer as it comes; Ctrl-C ends it."""
    import asyncio
    import signal

    from moeshard.serving.errors import ApiError

    before = conversation.decision
    task = loop.create_task(_write(conversation, line))
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        loop.run_until_complete(task)
    except asyncio.CancelledError:
        typer.secho("\n[stopped]", dim=True, err=True)
    except ApiError as error:
        typer.secho(f"[{error.message}]", fg=typer.colors.RED, err=True)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    decision = conversation.decision
    if decision is not None and decision is not before and decision.reason != "only":
        typer.secho(f"[{decision.backend}: {decision.detail}]", dim=True, err=True)


async def _write(conversation: Conversation, line: str) -> None:
    from contextlib import aclosing

    text = ""
    async with aclosing(conversation.say(line)) as events:
        async for event in events:
            text = event.text or text
            sys.stdout.write(event.text)
            sys.stdout.flush()
    if not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
