"""Worker side: the model repeats a context while its attention is watched (KVzip's scoring).

The passes run between vLLM's steps, over the prompt's blocks as they lie in the cache. Their
attention metadata is ours, so nothing is written: no slot, no block, no output, no random number.
Chunks of several prompts share a pass. A chunk is repeated looking at the sinks and itself, not at
the rest of the context, so that the cost is linear in the context, and the chunks of one context
can be repeated in different steps. Layers with a sliding window see the end of the whole context
(:mod:`.window_pass`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.planning.reconstruction import Chunk, iter_chunks
from vllm_kvzip.vllm_bridge.passes.last_token import last_token_metadata
from vllm_kvzip.vllm_bridge.passes.pass_metadata import PassMetadata, attend_over_both
from vllm_kvzip.vllm_bridge.passes.window_pass import WindowMetadata
from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d, set_forward_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.vllm_bridge.passes.window_caches import ContextEnd
    from vllm_kvzip.vllm_bridge.passes.window_pass import WindowEnds
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

    ScoreColumns = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, float, float | None], torch.Tensor
    ]


@dataclass(frozen=True)
class RepeatPrompt:
    """Token ids that ask for the context: of the first chunk, and of the later ones."""

    first: tuple[int, ...]
    later: tuple[int, ...]


@dataclass(eq=False)
class RepeatedContext:
    """One prompt's prefix while it is scored.

    Attributes:
        token_ids: the tokens before the boundary.
        pages: int64 ``[L, H, nb]``, where they lie.
        scores: float32 ``[L, H, T]``, filled chunk by chunk.
        chunks: all of them.
        end: where its end lies in layers with a sliding window; None where no layer has one, or
            where it is kept elsewhere.
        num_done: how many have been repeated.
    """

    token_ids: Sequence[int]
    pages: torch.Tensor
    scores: torch.Tensor
    chunks: list[Chunk]
    end: ContextEnd | None = None
    num_done: int = 0

    @property
    def num_left(self) -> int:
        """Chunks that are still to be repeated."""
        return len(self.chunks) - self.num_done

    def next_chunks(self, count: int) -> list[Chunk]:
        """The chunks that come next."""
        return self.chunks[self.num_done : self.num_done + count]

    @property
    def lacks_last_token(self) -> bool:
        """Whether windows would have to see a last token that is neither cached nor known."""
        end = self.end
        return end is not None and end.num_cached < len(self.token_ids) and not end.last_token


@dataclass(frozen=True)
class Segment:
    """Rows ``start:end`` of a pass repeat one chunk of a context."""

    start: int
    end: int
    context: RepeatedContext
    chunk: Chunk


@dataclass(frozen=True)
class ScoringMetadata(PassMetadata):
    """Attention metadata of a scoring pass.

    Attributes:
        segments: whose chunk lies in which rows.
        store: the pool of head pages.
        layer_index: vLLM layer name -> layer.
        num_sinks: first tokens of a context that every softmax includes.
        page_tokens: tokens per page.
        score_columns: queries ``[H, M, D]``, keys ``[H, C, D]``, log normalisers ``[H, M]``,
            scale and soft cap to the highest weight of each key, float32 ``[H, C]``.
    """

    segments: list[Segment]
    store: PageStore
    layer_index: dict[str, int]
    num_sinks: int
    page_tokens: int
    score_columns: ScoreColumns

    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Over sinks, chunk and the repeated tokens themselves; see :class:`PassMetadata`."""
        index = self.layer_index[layer.layer_name]
        num_heads, head_dim = key.shape[1], query.shape[2]
        for segment in self.segments:
            rows = slice(segment.start, segment.end)
            keys, values = self._sinks_and_chunk(segment, index)
            # [H, G * R, D]: the queries of a group share their head's keys.
            queries = query[rows].unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
            attended, log_normaliser = attend_over_both(
                queries, keys, values, key[rows].transpose(0, 1), value[rows].transpose(0, 1), impl
            )
            chunk = segment.chunk
            segment.context.scores[index, :, chunk.start : chunk.end] = self.score_columns(
                queries, keys[:, chunk.start - chunk.end :], log_normaliser, impl.scale,
                impl.logits_soft_cap,
            )  # fmt: skip
            by_head = attended.reshape(num_heads, -1, segment.end - segment.start, head_dim)
            output[rows] = by_head.permute(2, 0, 1, 3).flatten(1, 2)

    def _sinks_and_chunk(self, segment: Segment, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached keys and values ``[H, S + C, D]`` that a segment looks at."""
        chunk, pages = segment.chunk, segment.context.pages[layer]
        size = self.page_tokens
        first, last = chunk.start // size, -(-chunk.end // size)
        inside = slice(chunk.start - first * size, chunk.end - first * size)
        num_sinks = min(self.num_sinks, chunk.start)
        sink_pages = pages[:, : -(-num_sinks // size)]
        parts = []
        for read in (self.store.read_keys, self.store.read_values):
            sinks = read(sink_pages, layer)[:, :num_sinks]
            parts.append(torch.cat([sinks, read(pages[:, first:last], layer)[:, inside]], dim=1))
        return parts[0], parts[1]


class ReconstructionPass:
    """Runs the model over repeated contexts.

    Args:
        model: vLLM's model; called with ``input_ids`` and ``positions``.
        vllm_config: of the engine.
        cache: what the contexts lie in, a ``HeadPageCache`` or what is read like one.
        repeat: what asks for the context.
        rule: how a context is cut.
        num_sinks: first tokens of a context that every softmax includes.
        max_tokens: tokens of one pass.
        max_positions: positions the model has; see :func:`.rotary.num_positions`.
        score_columns: see :class:`ScoringMetadata`.
        windows: reads the ends of contexts in layers with a sliding window; None where no layer
            has one.
        skip_compiled: whether the model runs as it was written, for passes before vLLM compiles it.
    """

    def __init__(
        self,
        *,
        model: Any,
        vllm_config: VllmConfig,
        cache: Any,
        repeat: RepeatPrompt,
        rule: RepeatRule,
        num_sinks: int,
        max_tokens: int,
        max_positions: int,
        score_columns: ScoreColumns,
        windows: WindowEnds | None = None,
        skip_compiled: bool = False,
    ) -> None:
        self._windows = windows
        self._skip_compiled = skip_compiled
        self._model = model
        self._vllm_config = vllm_config
        self._geometry = cache.geometry
        self._pool = cache.pool
        self._store = cache.store
        self._score_columns = score_columns
        self._layer_index = cache.layer_index
        self._repeat = repeat
        self._num_sinks = num_sinks
        self._chunk_tokens = rule.chunk_tokens
        self._max_tokens = max_tokens
        self._max_positions = max_positions

    def begin(
        self, token_ids: Sequence[int], blocks: Sequence[int], end: ContextEnd | None = None
    ) -> RepeatedContext:
        """Make ready to score the prefix of a prompt.

        Args:
            token_ids: the tokens before the boundary.
            blocks: where they lie.
            end: see :class:`RepeatedContext`.
        """
        geometry, device = self._geometry, self._store.device
        return RepeatedContext(
            token_ids,
            self._pool.page_ids(async_tensor_h2d(list(blocks), device, torch.int64)),
            torch.zeros(geometry.num_layers, geometry.num_kv_heads, len(token_ids), device=device),
            list(
                iter_chunks(token_ids, self._chunk_tokens, self._repeat.first, self._repeat.later)
            ),
            end,
        )

    def go_on(self, work: Sequence[tuple[RepeatedContext, int]]) -> None:
        """Repeat the next chunks of some contexts.

        Args:
            work: contexts, and how many chunks of each.
        """
        if incomplete := [context for context, _ in work if context.lacks_last_token]:
            self._read_last_tokens(incomplete)
        for batch in self._batches(work):
            self._forward(batch)
        for context, count in work:
            context.num_done += count

    def _batches(self, work: Sequence[tuple[RepeatedContext, int]]) -> Iterator[list[Segment]]:
        """The chunks of all contexts, as many in one pass as fit."""
        batch: list[Segment] = []
        end = 0
        for context, count in work:
            for chunk in context.next_chunks(count):
                if batch and end + len(chunk.input_ids) > self._max_tokens:
                    yield batch
                    batch, end = [], 0
                start, end = end, end + len(chunk.input_ids)
                batch.append(Segment(start, end, context, chunk))
        if batch:
            yield batch

    def _forward(self, segments: list[Segment]) -> torch.Tensor:
        """One pass; returns the model's hidden states, ``[num_tokens, hidden size]``."""
        tokens = [token for segment in segments for token in segment.chunk.input_ids]
        positions = torch.cat([self._positions(segment) for segment in segments])
        return self._run(tokens, positions, self._metadata(segments))

    def _read_last_tokens(self, contexts: list[RepeatedContext]) -> None:
        """Compute what windows see of contexts whose last token has not been computed."""
        assert self._windows is not None
        tokens = [context.token_ids[-1] for context in contexts]
        places = [len(context.token_ids) - 1 for context in contexts]
        metadata, found = last_token_metadata(
            contexts, self._store, self._layer_index, self._windows
        )
        self._run(tokens, async_tensor_h2d(places, self._store.device, torch.int64), metadata)
        for context, last_token in zip(contexts, found, strict=True):
            assert context.end is not None
            context.end.last_token = last_token

    def _run(
        self, tokens: list[int], positions: torch.Tensor, metadata: dict[str, PassMetadata]
    ) -> torch.Tensor:
        """Run the model; returns its hidden states, ``[num_tokens, hidden size]``."""
        device = self._store.device
        input_ids = async_tensor_h2d(tokens, device, torch.int32)  # as vLLM compiled the model
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=len(tokens),
            skip_compiled=self._skip_compiled,
        ):
            hidden: torch.Tensor = self._model(input_ids=input_ids, positions=positions)
        return hidden

    def _metadata(self, segments: list[Segment]) -> dict[str, PassMetadata]:
        """Attention metadata of a pass, by vLLM's layer name."""
        scoring = ScoringMetadata(
            segments,
            self._store,
            self._layer_index,
            self._num_sinks,
            self._geometry.page_tokens,
            self._score_columns,
        )
        metadata: dict[str, PassMetadata] = dict.fromkeys(self._layer_index, scoring)
        if self._windows is not None:
            ends = WindowMetadata(segments, self._windows)
            metadata |= dict.fromkeys(self._windows.windows, ends)
        return metadata

    def _positions(self, segment: Segment) -> torch.Tensor:
        """Behind the context, as if it were asked to go on; a model looks in vain for what is said
        at positions behind its own. Only a context that leaves the model no such positions is
        repeated at the last it has, and then the end of the context is scored too low.
        """
        length = len(segment.chunk.input_ids)
        first = max(0, min(len(segment.context.token_ids), self._max_positions - length))
        return torch.arange(first, first + length, device=self._store.device)
