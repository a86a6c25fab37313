"""Attention over KV pairs that lie in several kinds of pages, as one softmax; for CPUs.

vLLM's CPU kernel tells no normaliser, so its result cannot be joined with that over quantized
pages. Pages are therefore attended to here one by one, some at a time, as batched products, and
every page's part goes into its sequence's running softmax (online softmax, arXiv 1805.02867). The
other way, dequantized scratch pages for vLLM's kernel, must also rotate every key and value back
and pack them for that kernel, which takes several times as long (scripts/benchmark_quantized.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.model.capped_attention import cap_logits_
from vllm_kvzip.model.fused_attention import attend_with_normaliser
from vllm_kvzip.quantization.rotation import rotate, rotate_back

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_kvzip.core import CompressedPrefix
    from vllm_kvzip.model.key_transform import KeyTransform
    from vllm_kvzip.quantization.reading import PageReader

VALUES_AT_ONCE = 2**20
"""Numbers of keys that are looked at together; more would not stay in a core's cache."""


@dataclass(frozen=True)
class TierPages:
    """Pages of one layer that some sequences attend over, in the order of the sequences.

    Attributes:
        ids: int64 ``[P]``.
        owners: int64 ``[P]``, whose they are.
        first: int64 ``[P]``, number of a page's first token in its sequence.
    """

    ids: torch.Tensor
    owners: torch.Tensor
    first: torch.Tensor


def quantized_tokens(
    prefix: CompressedPrefix, boundary_tokens: int, block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Tokens that each head keeps quantized, int64 ``[L, H]``.

    Pages are full, but where a head keeps everything.

    Args:
        prefix: with a quantized tier.
        boundary_tokens: of the prefix before compression.
        block_tokens, page_tokens: N and Q.
    """
    assert prefix.quantized is not None
    left = boundary_tokens - prefix.pages * block_tokens
    return torch.minimum(prefix.quantized.pages * page_tokens, left)


class RunningSoftmax:
    """Softmax attention of some query rows of some sequences, page by page.

    Args:
        queries: float32 ``[S, M, D]``, scaled; S sequences of M rows each.
        offsets: float32 ``[S, M]``, what is added to all logits of a row from now on.
        soft_cap: of all logits; 0: none.
        sink_logits: float32 ``[S, M]``, a logit of each row that joins its softmax and has no
            value; None: there is none.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        offsets: torch.Tensor | None = None,
        soft_cap: float = 0.0,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        self.queries = queries
        self.offsets = offsets
        self._soft_cap = soft_cap
        if sink_logits is None:
            self._best = queries.new_full(queries.shape[:2], float("-inf"))
            self._total = queries.new_zeros(queries.shape[:2])
        else:
            self._best, self._total = sink_logits, torch.ones_like(sink_logits)
        self.attended = torch.zeros_like(queries)

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, owners: torch.Tensor, seen: torch.Tensor
    ) -> None:
        """Attend to some pages as well.

        Args:
            keys, values: float32 ``[n, T, D]``; values are finite.
            owners: int64 ``[n]``, the sequence of each page.
            seen: int64 ``[n, M]``, or ``[n, 1]`` for all rows: a row sees that many of a page's
                first tokens.
        """
        logits = torch.bmm(self.queries[owners], keys.transpose(1, 2))
        if self.offsets is not None:
            logits += self.offsets[owners][..., None]
        cap_logits_(logits, self._soft_cap)
        hidden = torch.arange(keys.shape[1]) >= seen[..., None]
        logits.masked_fill_(hidden, float("-inf"))
        highest = logits.amax(dim=2)
        rows = owners[:, None].expand_as(highest)
        best = self._best.scatter_reduce(0, rows, highest, "amax")
        anchor = torch.where(best == float("-inf"), 0.0, best)  # a row that has seen nothing yet
        shrink = (self._best - anchor).exp()
        weights = (logits - anchor[owners][..., None]).exp_()
        self._total = (self._total * shrink).index_add_(0, owners, weights.sum(dim=2))
        self.attended *= shrink[..., None]
        self.attended.index_add_(0, owners, torch.bmm(weights, values))
        self._best = best

    def result(self) -> torch.Tensor:
        """Attention over all that was added, float32 ``[S, M, D]``; rows see something."""
        return self.attended / self._total[..., None]


@dataclass(frozen=True)
class TieredAttention:
    """How pages of either tier are read.

    Attributes:
        reader: of quantized pages.
        rotated: whether these hold rotated keys and values.
        read_quantized: page ids to bytes, uint8 ``[n, page_bytes]``.
        read_full: page ids to keys and values ``[n, N, D]`` of ordinary pages.
        scale: softmax scale.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; 0: they stay.
    """

    reader: PageReader
    rotated: bool
    read_quantized: Callable[[torch.Tensor], torch.Tensor]
    read_full: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scale: float
    soft_cap: float = 0.0

    def attend_rows(
        self,
        queries: torch.Tensor,
        quantized: TierPages,
        num_quantized: torch.Tensor,
        transform: KeyTransform,
        full: TierPages,
        seen: torch.Tensor,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of few query rows of many sequences.

        Args:
            queries: ``[S, M, D]``.
            quantized: quantized pages; every row sees their tokens.
            num_quantized: int64 ``[S]``, tokens in them.
            transform: ``[S]``, of their keys.
            full: ordinary pages, the sequence's own latest tokens included.
            seen: int64 ``[S, M]``, how many tokens of these each row sees.
            sink_logits: float32 ``[S, M]``, see :class:`RunningSoftmax`.

        Returns:
            float32, like ``queries``.
        """
        scaled = queries.float() * self.scale
        reader = self.reader
        softmax = RunningSoftmax(
            self._inward(transform.queries(scaled)), transform.offsets(scaled), self.soft_cap,
            sink_logits,
        )  # fmt: skip
        page_tokens, head_dim = reader.layout.page_tokens, reader.layout.head_dim
        shift = self._inward(transform.first_shift())
        width = min(shift.shape[1], page_tokens)
        for part in _parts(len(quantized.ids), page_tokens * head_dim):
            keys, values = reader.read(self.read_quantized(quantized.ids[part]))
            owners = quantized.owners[part]
            begins = (quantized.first[part] == 0).nonzero().flatten()
            keys[begins, :width] += shift[owners[begins], :width]
            tokens = num_quantized[owners] - quantized.first[part]
            softmax.add(keys, values, owners, tokens[:, None])
        softmax.queries, softmax.offsets = scaled, None
        softmax.attended = self._outward(softmax.attended)
        for part in _parts(len(full.ids), page_tokens * head_dim):
            keys, values = (half.float() for half in self.read_full(full.ids[part]))
            owners = full.owners[part]
            tokens = seen[owners] - full.first[part, None]
            last = tokens.amax(dim=1)
            cut = (last < values.shape[1]).nonzero().flatten()
            if len(cut):  # what lies after a sequence's last token may be anything
                empty = torch.arange(values.shape[1]) >= last[cut, None]
                values[cut] = values[cut].masked_fill(empty[..., None], 0.0)
            softmax.add(keys, values, owners, tokens)
        return softmax.result()

    def attend_causally(
        self,
        queries: torch.Tensor,
        quantized_ids: torch.Tensor,
        num_quantized: int,
        transform: KeyTransform,
        full_ids: torch.Tensor,
        num_full: int,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of many query rows of one sequence, whose last tokens they are.

        Args:
            queries: ``[G, M, D]``, query heads that share the sequence's KV head.
            quantized_ids: int64, its quantized pages.
            num_quantized: tokens in them.
            transform: of their keys.
            full_ids: int64, its ordinary pages, those of the query rows included.
            num_full: tokens in them.
            sink_logits: float32 ``[G]``, of each query head; see :class:`RunningSoftmax`.

        Returns:
            float32, like ``queries``.
        """
        group, num_rows, head_dim = queries.shape
        queries = queries.float().contiguous()
        how: dict[str, Any] = {"scale": self.scale, "soft_cap": self.soft_cap}
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        if num_quantized:
            read = self.reader.read(self.read_quantized(quantized_ids))
            keys, values = (half.flatten(0, 1)[:num_quantized] for half in read)
            shift = self._inward(transform.first_shift())[:num_quantized]
            keys[: len(shift)] += shift
            attended, log = attend_with_normaliser(
                self._inward(transform.queries(queries)).view(1, -1, head_dim),
                keys[None],
                values[None],
                causal=False,
                offsets=transform.offsets(queries).view(1, -1),
                **how,
            )
            parts.append((self._outward(attended).view_as(queries), log.view(group, num_rows)))
        keys, values = (half.float().flatten(0, 1) for half in self.read_full(full_ids))
        before = num_full - num_rows
        if before:
            attended, log = attend_with_normaliser(
                queries.reshape(1, -1, head_dim), keys[None, :before], values[None, :before],
                causal=False, **how,
            )  # fmt: skip
            parts.append((attended.view_as(queries), log.view(group, num_rows)))
        own_keys, own_values = (
            half[before:num_full].expand(group, -1, -1) for half in (keys, values)
        )
        if sink_logits is not None:
            how["sink_logits"] = sink_logits[:, None]
        parts.append(attend_with_normaliser(queries, own_keys, own_values, causal=True, **how))
        return _join(parts)

    def _inward(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries as quantized keys want them, or what is added to such keys."""
        turned = rotate(queries) if self.rotated else queries
        return turned[..., self.reader.key_order].contiguous()

    def _outward(self, attended: torch.Tensor) -> torch.Tensor:
        """Weighted sums of quantized values as those of ordinary ones."""
        turned = torch.empty_like(attended)
        turned[..., self.reader.value_order] = attended
        return rotate_back(turned) if self.rotated else turned


def _parts(num_pages: int, page_values: int) -> Sequence[slice]:
    step = max(1, VALUES_AT_ONCE // page_values)
    return [slice(first, first + step) for first in range(0, num_pages, step)]


def _join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax of parts with their log normalisers, ``[..., M, D]`` and ``[..., M]``."""
    logs = torch.stack([log for _, log in parts])
    shares = (logs - logs.logsumexp(dim=0)).exp()
    return torch.stack(
        [share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True)]
    ).sum(dim=0)
