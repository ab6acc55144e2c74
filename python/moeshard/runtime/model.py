"""A loaded model: tokenizer, logits, generation and routing traces, each under a keep."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.arrays import TokensLike
from moeshard.runtime.chat import Chat
from moeshard.runtime.facts import ModelFacts
from moeshard.runtime.generation import Generation, generation_options
from moeshard.runtime.limits import MAX_INT32
from moeshard.runtime.loaded import Holder, Loaded
from moeshard.runtime.origin import LoadOptions, Origin, find_origin
from moeshard.runtime.session import Session, as_tokens
from moeshard.runtime.states import StateReader
from moeshard.runtime.template import Message
from moeshard.runtime.trace import ChunkSink, Trace, TraceBuilder

if TYPE_CHECKING:
    from moeshard.keep.text import KeepSpec


class Model(ModelFacts):
    """A GGUF model in llama.cpp. Safe to use from several threads; computing releases the GIL."""

    def __init__(
        self,
        path: str | os.PathLike[str] | Origin | None = None,
        *,
        keep: KeepSpec | None = None,
        recovery: str | os.PathLike[str] | None = None,
        trunk: str | os.PathLike[str] | None = None,
        experts: str | os.PathLike[str] | None = None,
        n_expert_used: int | None = None,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        mmap: bool = True,
        rpc: Sequence[str] = (),
        layer_split: Sequence[int] | None = None,
        progress: Callable[[float], object] | None = None,
    ):
        """Load a model.

        Args:
            path: a GGUF file, or any part (``-00001-of-0000N.gguf``) of one; or segments of files.
            keep: load only these experts, as `moeshard.split` would write them but without a file: only their bytes are
                read, and the memory used is that of the shard. The model then has that many experts, numbered anew in
                their order: see `expert_ids`. Layers may keep different numbers of them.
            recovery: with `keep`, a file of `moeshard.recover` for it: its corrected tensors are loaded.
            trunk, experts: instead of `path`, the two files of a shard whose trunk was written once.
            n_expert_used: experts per token, in every layer that routes, instead of what the model says.
            n_ctx: tokens that a sequence can hold; by default what the model was trained on, at most 4096. A longer
                text given at once gets a context that holds it.
            n_batch: tokens handed to the engine at once.
            n_ubatch: tokens computed at once.
            n_threads: 0 for as many as the processors this process may use.
            n_gpu_layers: layers on the GPU, where there is one; negative for all.
            mmap: map the file instead of reading it into memory.
            rpc: workers (``host:port``, see ``moeshard worker``) that hold the layers, in this order. Where one is
                lost, what was being computed raises an error, and the next call loads the model again.
            layer_split: how many layers each worker holds; by default as fits their memory.
            progress: called with the fraction loaded; returning False (nothing else) stops the load.

        Raises:
            MoeshardError: the file is missing, damaged, or no model that llama.cpp can run; a worker cannot be used.
        """
        if n_expert_used is not None and n_expert_used < 1:
            raise MoeshardError(f"n_expert_used must be positive, got {n_expert_used}")
        self._origin = find_origin(path, keep, trunk, experts, n_expert_used or 0, recovery)
        self._source: dict[str, Any] = {
            "path": path,
            "keep": keep,
            "trunk": trunk,
            "experts": experts,
            "recovery": recovery,
        }
        if n_ctx is not None and not 1 <= n_ctx <= MAX_INT32:
            raise MoeshardError(f"n_ctx must be from 1 to {MAX_INT32}, got {n_ctx}")
        self._load_options: LoadOptions = {
            "n_gpu_layers": n_gpu_layers,
            "mmap": mmap,
            "n_expert_used": n_expert_used or 0,
            "rpc": list(rpc),
            "layer_split": None if layer_split is None else list(layer_split),
        }
        self._context_options = {"n_batch": n_batch, "n_ubatch": n_ubatch, "n_threads": n_threads}
        self._masks = threading.local()
        self._holder = Holder(self._origin, self._load_options, self._context_options, n_ctx, progress)
        self._n_ctx = self._holder.n_ctx

    @property
    def _loaded(self) -> Loaded:
        return self._holder.get()

    @property
    def _native(self) -> _core.Model:
        return self._loaded.native

    def sibling(self, path: str | os.PathLike[str] | None = None, *, n_expert_used: int | None = None) -> Model:
        """Load another file, or the same experts of the same file with others per token, to run as this model does.

        A file that is mapped twice takes its memory once; on a GPU its weights are there twice.
        """
        source = self._source if path is None else {"path": path}
        return Model(**source, n_expert_used=n_expert_used, **self.load_options)

    def close(self) -> None:
        """Free the model, as soon as the sessions and answers that still use it are closed; then no call works.

        Over workers it is freed at once.
        """
        self._holder.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def load_options(self) -> dict[str, Any]:
        """How to load another model that is to run as this one does: further arguments of `Model`."""
        options: dict[str, Any] = {**self._load_options, **self._context_options}
        del options["n_expert_used"]  # of this model
        return {"n_ctx": self._n_ctx, **options}

    # Text and tokens.

    def tokenize(self, text: str, *, special: bool = True, parse: bool = False) -> npt.NDArray[np.int32]:
        """Return int32 (n,) token ids.

        `special` adds the tokens that the model wants around a text; `parse` reads control tokens written in it.
        """
        return self._native.tokenize(text, special, parse)

    def detokenize(self, tokens: TokensLike, *, special: bool = False) -> str:
        """Return the text of the tokens; bytes that are no UTF-8 become U+FFFD. `special` shows control tokens."""
        return self._native.detokenize(as_tokens(tokens), special).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return what a token reads, a control token too; a piece of a character, maybe."""
        return self._native.detokenize([token], True)

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return self._native.is_end_of_generation(token)

    @property
    def has_chat_template(self) -> bool:
        return self._native.has_chat_template

    def chat_prompt(self, messages: Sequence[Message], *, template: str = "", answer: bool = True) -> str:
        """Format messages ``{"role": …, "content": …}`` as the model's chat template does, as transformers renders it.

        For text to look at, or to pass on: to this model give :meth:`chat_tokens`, where what a message says can not
        be taken for a control token. A token that the tokenizer puts before every text (BOS) is left out.

        Args:
            messages: of a conversation, in order; other keys are the template's business.
            template: instead of the model's own one: the name of another that it has, or of one that llama.cpp knows
                (``"chatml"``), or a file of Jinja, or Jinja itself.
            answer: whether the model's answer is to follow.

        Raises:
            MoeshardError: there is no template, or it fails or refuses these messages; it is named.
        """
        return self._chat.text(messages, template, answer)

    def chat_tokens(
        self, messages: Sequence[Message], *, template: str = "", answer: bool = True
    ) -> npt.NDArray[np.int32]:
        """Return int32 (n,): the tokens of `chat_prompt` for these messages, BOS included once where the model has it.

        Control tokens are those that the template writes: ``<|im_end|>`` in a message is text.

        Raises:
            MoeshardError: as `chat_prompt`; or the template looks for a control token that a message contains, and
                leaves some in the text, so that nobody can say whose they are.
        """
        return self._chat.tokens(messages, template, answer)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self._native)

    # Keeps.

    def keep(self, spec: KeepSpec) -> npt.NDArray[np.bool_]:
        """Return bool (n_layer, n_expert) from an array, ``"0-63,70"`` or a file with a line per layer."""
        from moeshard.keep.text import parse_keep

        return parse_keep(spec, self.n_layer, self.n_expert, moe_layers=self.moe_layers)

    @contextmanager
    def masked(self, keep: KeepSpec | None) -> Iterator[Model]:
        """Within the block, calls of this thread that name no keep of their own use this one.

        Raises MoeshardError where the keep does not fit the model, naming the layer.
        """
        mask = None if keep is None else self.keep(keep)
        if mask is not None:
            _core.check_keep(mask, self.routing)
        outer = getattr(self._masks, "current", None)
        self._masks.current = mask
        try:
            yield self
        finally:
            self._masks.current = outer

    def state_reader(self, n_seq: int, n_ctx: int) -> StateReader:
        """Return what reads the inner states of `n_seq` sequences of at most `n_ctx` tokens at a time."""
        loaded = self._loaded
        context = loaded.engine.context(
            loaded.native, n_ctx=n_ctx, n_seq_max=n_seq, states=True, **self._context_options
        )
        return StateReader(context)

    def _mask(self, keep: KeepSpec | None) -> npt.NDArray[np.bool_] | None:
        if keep is None:
            mask: npt.NDArray[np.bool_] | None = getattr(self._masks, "current", None)
            return mask
        return self.keep(keep)

    # Computing.

    def logits(self, tokens: TokensLike, keep: KeepSpec | None = None) -> npt.NDArray[np.float32]:
        """Return float32 (n_tokens, n_vocab): after every token, the scores of the next one.

        With `keep`, tokens are routed to kept experts only. Raises MoeshardError where the keep does not fit.
        """
        return self.logits_batch([tokens], [keep])[0]

    def logits_batch(
        self, sequences: Sequence[TokensLike], keeps: Sequence[KeepSpec | None] | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Return the logits of several sequences computed in shared batches, each under its own keep.

        `keeps` has one entry per sequence, None for all experts. Each result is float32 (n_tokens, n_vocab).
        """
        arrays = [as_tokens(tokens) for tokens in sequences]
        if keeps is not None and len(keeps) != len(arrays):
            raise MoeshardError(f"{len(arrays)} sequences need as many keeps, got {len(keeps)}")
        if not arrays:
            return []
        with self.session(n_seq=len(arrays), n_ctx=max(len(array) for array in arrays)) as session:
            for seq, keep in enumerate(keeps or []):
                if keep is not None:
                    session.set_keep(keep, seq)
            result = session.decode(dict(enumerate(arrays)), "all")
        return [result[seq] for seq in range(len(arrays))]

    def generate(
        self,
        prompt: str | TokensLike,
        keep: KeepSpec | None = None,
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
    ) -> Generation:
        """Return an iterator over the pieces of the text that follows `prompt`.

        Args:
            prompt: text, or token ids.
            keep: the experts that may be used, for the prompt too.
            max_tokens: negative for as many as `n_ctx` of the model leaves room for.
            temperature: 0 for the likeliest token each time.
            top_k: sample from so many likeliest tokens; 0 for all.
            top_p: sample from the likeliest tokens that together have this probability; 1 for all.
            min_p: drop tokens less likely than this fraction of the likeliest; 0 for none.
            repeat_penalty: divides the scores of recent tokens; 1 for none.
            repeat_last_n: how many tokens are recent.
            seed: None for a random one.
            stop: text, or several, that ends the generation; not part of it.
            ignore_end: go on where the model would end.

        Raises MoeshardError for an empty prompt, a parameter out of range or a keep that does not fit.
        """
        options = generation_options(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            stop=stop,
        )
        tokens = self.tokenize(prompt, parse=True) if isinstance(prompt, str) else as_tokens(prompt)
        lease = self._loaded.contexts.take(1, max(self._n_ctx, len(tokens) + max(max_tokens, 0)))
        try:
            lease.context.set_keep(self._mask(keep))
            native = self._loaded.engine.generation(
                lease.context,
                tokens,
                max_tokens=options.pop("max_tokens"),
                stop=options.pop("stop"),
                ignore_end=ignore_end,
                sampling=_core.SamplingParams(**options),
            )
        except BaseException:
            lease.close()
            raise
        return Generation(native, lease)

    def batcher(
        self, n_slots: int = 4, n_ctx: int | None = None, *, n_prefill: int = 512, meter: bool = False
    ) -> _core.Batcher:
        """Return what computes many requests together, a token of each per step; see csrc/include/moeshard/batcher.hpp.

        Args:
            n_slots: requests computed at once.
            n_ctx: tokens that each can hold; by default those of the model.
            n_prefill: tokens of prompts computed per step, which all others wait for.
            meter: measure what requests under a keep miss; see `Session.missed`.
        """
        engine, native, *_ = self._loaded
        options = {"n_slots": n_slots, "n_ctx": n_ctx or self._n_ctx, "n_prefill": n_prefill, **self._context_options}
        return engine.batcher(native, meter=meter, **options)

    def trace(
        self, tokens: TokensLike, keep: KeepSpec | None = None, *, probs: bool = False, norms: bool = False
    ) -> Trace:
        """Return which experts each token of a sequence was sent to.

        `probs` adds the router's scores of all experts, `norms` the L2 norms of the chosen experts' outputs; see
        :class:`Trace` for shapes. For texts that should not be held in memory whole, see :meth:`trace_stream`.
        """
        array = as_tokens(tokens)
        builder = TraceBuilder(self.routing, len(array), self.n_expert_used, probs=probs, norms=norms)
        self.trace_stream(array, builder.add, keep, probs=probs, norms=norms)
        return builder.build()

    def trace_stream(
        self,
        tokens: TokensLike,
        sink: ChunkSink,
        keep: KeepSpec | None = None,
        *,
        probs: bool = False,
        norms: bool = False,
    ) -> None:
        """Hand the routing of a sequence to `sink`, one :class:`TraceChunk` per micro-batch (``n_ubatch`` tokens).

        What `sink` raises ends the computation and is raised here.
        """
        array = as_tokens(tokens)
        with self.session(n_ctx=len(array)) as session:
            if keep is not None:
                session.set_keep(keep)
            session.trace({0: array}, sink, probs=probs, norms=norms)

    @cached_property
    def computed_layers(self) -> list[int]:
        """Of `moe_layers`, those in which a token is routed, found by computing one.

        Not so are blocks that predict further tokens, and layers whose router an architecture loads and does not use:
        nothing is measured in them, and no loss comes from them.
        """
        found: set[int] = set()
        self.trace_stream([0], lambda chunk: found.update(layer.layer for layer in chunk.layers))
        return sorted(found)

    def session(self, n_seq: int = 1, n_ctx: int | None = None) -> Session:
        """Return `n_seq` sequences of `n_ctx` tokens each, to be decoded in shared batches under a keep each."""
        if n_seq < 1:
            raise MoeshardError(f"n_seq must be positive, got {n_seq}")
        lease = self._loaded.contexts.take(n_seq, n_ctx or self._n_ctx)
        try:
            lease.context.set_keep(self._mask(None))
        except BaseException:
            lease.close()
            raise
        return Session(lease, lambda keep: None if keep is None else self.keep(keep))
