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
from moeshard.runtime.contexts import ContextPool
from moeshard.runtime.generation import Generation
from moeshard.runtime.origin import find_origin
from moeshard.runtime.session import Session, as_tokens
from moeshard.runtime.trace import ChunkSink, Trace, TraceBuilder

if TYPE_CHECKING:
    from moeshard.keep.text import KeepSpec

Message = dict[str, str]

# Of the models that run here most were trained on far more than fits; a longer text gets a longer context by itself.
DEFAULT_CTX = 4096


class Model:
    """A GGUF model in llama.cpp. Safe to use from several threads; computing releases the GIL."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        keep: KeepSpec | None = None,
        trunk: str | os.PathLike[str] | None = None,
        experts: str | os.PathLike[str] | None = None,
        n_expert_used: int | None = None,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        mmap: bool = True,
        progress: Callable[[float], bool] | None = None,
    ):
        """Load a model.

        Args:
            path: a GGUF file, or the first part (``-00001-of-0000N.gguf``) of one.
            keep: load only these experts, as `moeshard.split` would write them but without a file: only their bytes are
                read, and the memory used is that of the shard. The model then has that many experts, numbered anew in
                their order: see `expert_ids`. Layers may keep different numbers of them.
            trunk, experts: instead of `path`, the two files of a shard whose trunk was written once.
            n_expert_used: experts per token, in every layer that routes, instead of what the model says.
            n_ctx: tokens that a sequence can hold; by default what the model was trained on, at most 4096. A longer
                text given at once gets a context that holds it.
            n_batch: tokens handed to the engine at once.
            n_ubatch: tokens computed at once.
            n_threads: 0 for as many as the processors this process may use.
            n_gpu_layers: layers on the GPU, where there is one; negative for all.
            mmap: map the file instead of reading it into memory.
            progress: called with the fraction loaded; False stops the load.

        Raises:
            MoeshardError: the file is missing, damaged, or no model that llama.cpp can run.
        """
        if n_expert_used is not None and n_expert_used < 1:
            raise MoeshardError(f"n_expert_used must be positive, got {n_expert_used}")
        self._origin = find_origin(path, keep, trunk, experts, n_expert_used or 0)
        self._native = self._origin.load(n_gpu_layers, mmap, n_expert_used or 0, progress)
        if n_ctx is not None and n_ctx < 1:
            raise MoeshardError(f"n_ctx must be positive, got {n_ctx}")
        self._n_ctx = n_ctx or min(self._native.n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)
        self._load_options: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "mmap": mmap}
        self._context_options = {"n_batch": n_batch, "n_ubatch": n_ubatch, "n_threads": n_threads}
        self._contexts = ContextPool(self._native, self._n_ctx, **self._context_options)
        self._masks = threading.local()

    def sibling(self, path: str | os.PathLike[str] | None = None, *, n_expert_used: int | None = None) -> Model:
        """Load another file, or the same with other experts per token, to run as this model does.

        A file that is mapped twice takes its memory once; on a GPU its weights are there twice.
        """
        return Model(self.path if path is None else path, n_expert_used=n_expert_used, **self.load_options)

    @property
    def load_options(self) -> dict[str, Any]:
        """How to load another model that is to run as this one does: further arguments of `Model`."""
        return {"n_ctx": self._n_ctx, **self._load_options, **self._context_options}

    # What the model is.

    @property
    def path(self) -> str:
        return self._native.path

    @property
    def routing(self) -> _core.Routing:
        """Layers, experts, experts per token and expert groups, as the engine uses them."""
        return self._native.routing

    @cached_property
    def layout(self) -> _core.MoeLayout:
        """What of the loaded weights depends on experts, and their bytes."""
        return self._origin.layout()

    @cached_property
    def expert_ids(self) -> npt.NDArray[np.int32]:
        """Int32 (n_layer, n_expert): which expert of the whole model each expert of this one is.

        The numbers themselves for a whole model, those kept, ascending, for a shard; -1 in layers without experts, and
        behind the last where a layer of a shard holds fewer than others.
        """
        ids = np.full((self.n_layer, self.n_expert), -1, dtype=np.int32)
        held = self._origin.held
        for layer in self.moe_layers:
            own = np.arange(self.n_expert) if held is None else np.flatnonzero(held[layer])
            ids[layer, : own.size] = own
        return ids

    @property
    def arch(self) -> str:
        """The architecture's name in llama.cpp, e.g. ``qwen3moe``."""
        return self.layout.arch

    @property
    def description(self) -> str:
        """Architecture, size and file type in one line."""
        return self._native.description

    @property
    def n_layer(self) -> int:
        """Blocks of the model: the rows of a keep."""
        return self.routing.n_layer

    @property
    def n_expert(self) -> int:
        """Experts per MoE layer: the columns of a keep. 0 for a dense model.

        In a shard whose layers hold different numbers (``routing.expert_counts``) it is the largest of them, and what a
        keep says of experts that a layer does not have carries no meaning.
        """
        return self.routing.n_expert

    @property
    def is_whole(self) -> bool:
        """Whether no expert of the model was left out."""
        held = self._origin.held
        return held is None or bool(held[self.moe_layers].all())

    @property
    def n_expert_used(self) -> int:
        """Experts that each token uses (of the widest layer where layers differ: see ``routing``)."""
        return max(self.routing.n_expert_used, default=0)

    @property
    def moe_layers(self) -> list[int]:
        """The layers that route, ascending."""
        return self.routing.moe_layers

    @cached_property
    def computed_layers(self) -> list[int]:
        """Of `moe_layers`, those in which a token is routed, found by computing one.

        Not so are blocks that predict further tokens, and layers whose router an architecture loads and does not use:
        nothing is measured in them, and no loss comes from them.
        """
        found: set[int] = set()
        self.trace_stream([0], lambda chunk: found.update(layer.layer for layer in chunk.layers))
        return sorted(found)

    @property
    def n_vocab(self) -> int:
        return self._native.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """TokensLike of context that the model was trained on."""
        return self._native.n_ctx_train

    @property
    def trunk_bytes(self) -> int:
        """Bytes of all tensors that are not routed experts."""
        return self.layout.trunk_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.layout.expert_bytes

    # Text and tokens.

    def tokenize(self, text: str, *, special: bool = True, parse: bool = False) -> npt.NDArray[np.int32]:
        """Return int32 (n,) token ids.

        `special` adds the tokens that the model wants around a text; `parse` reads control tokens written in it.
        """
        return self._native.tokenize(text, special, parse)

    def detokenize(self, tokens: TokensLike, *, special: bool = False) -> str:
        """Return the text of the tokens; bytes that are no UTF-8 become U+FFFD. `special` shows control tokens."""
        return self._native.detokenize(as_tokens(tokens), special).decode("utf-8", errors="replace")

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return self._native.is_end_of_generation(token)

    def chat_prompt(self, messages: Sequence[Message], *, template: str = "", answer: bool = True) -> str:
        """Format messages ``{"role": …, "content": …}`` as the model's chat template does, ready for its answer or not.

        Raises MoeshardError where the model has no template, or none that llama.cpp knows.
        """
        return self._native.apply_chat_template([(m["role"], m["content"]) for m in messages], answer, template)

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
        stop: Sequence[str] = (),
        ignore_end: bool = False,
    ) -> Generation:
        """Return an iterator over the pieces of the text that follows `prompt`.

        Args:
            prompt: text, or token ids.
            keep: the experts that may be used, for the prompt too.
            max_tokens: negative for as many as the context holds.
            temperature: 0 for the likeliest token each time.
            top_k: sample from so many likeliest tokens; 0 for all.
            top_p: sample from the likeliest tokens that together have this probability; 1 for all.
            min_p: drop tokens less likely than this fraction of the likeliest; 0 for none.
            repeat_penalty: divides the scores of recent tokens; 1 for none.
            repeat_last_n: how many tokens are recent.
            seed: None for a random one.
            stop: texts that end the generation; not part of it.
            ignore_end: go on where the model would end.

        Raises MoeshardError for an empty prompt, a parameter out of range or a keep that does not fit.
        """
        tokens = self.tokenize(prompt, parse=True) if isinstance(prompt, str) else as_tokens(prompt)
        lease = self._contexts.take(1, len(tokens) + max(max_tokens, 0))
        try:
            lease.context.set_keep(self._mask(keep))
            native = _core.Generation(
                lease.context,
                tokens,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n,
                seed=seed,
                stop=list(stop),
                ignore_end=ignore_end,
            )
        except BaseException:
            lease.close()
            raise
        return Generation(native, lease)

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

    def session(self, n_seq: int = 1, n_ctx: int | None = None) -> Session:
        """Return `n_seq` sequences of `n_ctx` tokens each, to be decoded in shared batches under a keep each."""
        if n_seq < 1:
            raise MoeshardError(f"n_seq must be positive, got {n_seq}")
        lease = self._contexts.take(n_seq, n_ctx or self._n_ctx)
        try:
            lease.context.set_keep(self._mask(None))
        except BaseException:
            lease.close()
            raise
        return Session(lease, lambda keep: None if keep is None else self.keep(keep))
