"""Worker side: queries of each context's last tokens, for scorers that look at them.

They are kept from the step that computes them until their prompt, or their answer in a round, is
compressed. Guesses that turned out wrong are computed anew at the same positions: the last queries
of a position count.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.vllm_bridge.attention.batches import QuerySpan
from vllm_kvzip.vllm_bridge.fp8_cache import queries_of_model
from vllm_kvzip.vllm_bridge.outcomes import log_failure

Queries = tuple[int, torch.Tensor]
"""Position of the first of some tokens in a request, and their queries ``[tokens, ...]``."""

if TYPE_CHECKING:
    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.vllm_bridge.symbols import SchedulerOutput
    from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker


class QueryObservation:
    """Decides whose queries a step must show, and keeps them.

    Args:
        geometry: of the compressed layers.
        layer_index: vLLM's layer name -> layer.
        window: how many of a context's last queries the scorer wants; 0: none.
        rounds_only: whether it wants none of a prompt or a context.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        layer_index: dict[str, int],
        window: int,
        rounds_only: bool = False,
    ) -> None:
        self._geometry = geometry
        self._layer_index = layer_index
        self._window = window
        self._rounds_only = rounds_only
        self._tokens_of: dict[str, tuple[int, int, int]] = {}  # this step, by request
        self._kept: dict[str, dict[int, list[Queries]] | None] = {}  # None: it failed

    def __len__(self) -> int:
        """How many requests have kept queries."""
        return len(self._kept)

    @property
    def is_due(self) -> bool:
        """Whether this step computes queries that are kept."""
        return bool(self._tokens_of)

    def plan_step(self, output: SchedulerOutput, tracker: RequestTracker) -> None:
        """Find the tokens of each request's chunk whose queries the scorer wants.

        Those are the context's last tokens, or in a round the last ones before its boundary. A
        request can find all of them and more in the prefix cache; then the first tokens after them
        are taken.
        """
        self._tokens_of = {}
        if not self._window:
            return
        for request, num_scheduled in tracker.in_prefill(output):
            assert request.plan is not None
            if self._rounds_only and not request.plan.is_round:
                continue
            rid, position = request.request_id, request.num_computed_tokens
            to_end = request.plan.num_observed_tokens - position
            if to_end > 0:
                begin, end = max(0, to_end - self._window), min(num_scheduled, to_end)
            elif rid in self._kept:  # a round waits until none of its tokens can be a guess
                continue
            else:
                begin, end = 0, min(num_scheduled, self._window)
            if begin < end:
                self._tokens_of[rid] = begin, end, position + begin

    def spans(self, request_ids: list[str], starts: torch.Tensor) -> tuple[QuerySpan, ...]:
        """Rows of the batch whose queries are kept.

        Args:
            request_ids: of the batch, in row order.
            starts: int32 ``[R + 1]`` on the CPU, first token row of each request.
        """
        if not self._tokens_of:
            return ()
        first_rows = starts.tolist()
        return tuple(
            QuerySpan(rid, first_rows[row] + tokens[0], first_rows[row] + tokens[1], tokens[2])
            for row, rid in enumerate(request_ids)
            if (tokens := self._tokens_of.get(rid)) is not None
        )

    def keep(
        self, layer: Any, query: torch.Tensor, spans: tuple[QuerySpan, ...], dtype: torch.dtype
    ) -> None:
        """Keep the queries of one layer; none of a draft model's, which vLLM's model runner V2 runs
        with the metadata of the target.

        Args:
            layer: vLLM's.
            query: ``[num_tokens, H * G, D]``.
            spans: which rows belong to whom.
            dtype: of the model.
        """
        index = self._layer_index[layer.layer_name]
        if index >= self._geometry.num_layers:
            return
        for span in spans:
            by_layer = self._kept.setdefault(span.request_id, defaultdict(list))
            if by_layer is None:
                continue
            try:
                rows = query[span.start : span.end].clone()
                by_layer[index].append((span.position, queries_of_model(layer, rows, dtype)))
            except Exception as error:  # its prefix will not be compressed
                self._kept[span.request_id] = None
                log_failure(span.request_id, error)

    def take(self, request_id: str) -> list[torch.Tensor] | None:
        """Kept queries of a request as ``[W, H, G, D]`` per layer, which are forgotten here.

        None when there are none, or when keeping them failed.
        """
        by_layer = self._kept.pop(request_id, None)
        if not by_layer:
            return None
        geometry = self._geometry
        shape = (-1, geometry.num_kv_heads, geometry.group_size, geometry.head_dim)
        return [joined(by_layer[layer]).view(shape) for layer in range(geometry.num_layers)]

    def forget(self, request_id: str) -> None:
        """Drop the kept queries of a request."""
        self._kept.pop(request_id, None)


def joined(parts: list[Queries]) -> torch.Tensor:
    """Queries of one layer by position, from parts in the order in which they were computed.

    Args:
        parts: one of them can begin before the end of an earlier one, whose last tokens were
            guesses then.
    """
    chosen: list[Queries] = []
    for position, rows in parts:
        while chosen and chosen[-1][0] >= position:
            chosen.pop()
        if chosen:
            first, before = chosen[-1]
            chosen[-1] = first, before[: position - first]
        chosen.append((position, rows))
    return torch.cat([rows for _, rows in chosen])
