"""KVzip's reconstruction scoring: what does the model look at while it repeats its context?

Section 3 of KVzip (arXiv 2505.23416): after the prefill the model is fed "repeat the previous
context" and the context itself. A KV pair's score is the most attention it receives from any of
those queries in its query group. The context is repeated chunk by chunk, each against its own
keys only, so the cost stays linear in the context (section 3.3). The wordings are the paper's
(section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.model.capped_attention import cap_logits_

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FIRST_REPEAT_PROMPT = "\n\nRepeat the previous context exactly."
LATER_REPEAT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with"
LINK_TOKENS = 8  # the end of the previous chunk, which tells the model where to go on


@dataclass(frozen=True)
class Chunk:
    """One piece of the context and what the model is fed to repeat it.

    Attributes:
        start, end: positions in the context.
        input_ids: repeat prompt, end of the previous chunk, the chunk.
    """

    start: int
    end: int
    input_ids: list[int]


@dataclass(frozen=True)
class RepeatRule:
    """How a context is cut for repeating, which follows from its length alone.

    Attributes:
        chunk_tokens: longest chunk of the context.
        first_prompt_tokens, later_prompt_tokens: length of the repeat prompt of the first chunk,
            and of the others.
    """

    chunk_tokens: int
    first_prompt_tokens: int
    later_prompt_tokens: int

    @classmethod
    def fitting(
        cls, chunk_tokens: int, most_tokens: int, first_prompt: int, later_prompt: int
    ) -> RepeatRule:
        """The longest chunks that can be fed at once.

        Args:
            chunk_tokens: longest chunk that is wanted, with what is fed before it.
            most_tokens: the most tokens that can be fed at once.
            first_prompt, later_prompt: tokens of the repeat prompts.
        """
        before = max(first_prompt, later_prompt) + LINK_TOKENS
        return cls(max(1, min(chunk_tokens, most_tokens) - before), first_prompt, later_prompt)

    def fed_tokens(self, context_tokens: int) -> list[int]:
        """Tokens that are fed to the model for each chunk of a context, in order."""
        fed = []
        for start in range(0, context_tokens, self.chunk_tokens):
            prompt = self.later_prompt_tokens if start else self.first_prompt_tokens
            chunk = min(self.chunk_tokens, context_tokens - start)
            fed.append(prompt + min(start, LINK_TOKENS) + chunk)
        return fed


def iter_chunks(
    context_ids: Sequence[int],
    chunk_tokens: int,
    first_prompt_ids: Sequence[int],
    later_prompt_ids: Sequence[int],
) -> Iterator[Chunk]:
    """Cut a context into chunks and build each one's input.

    Args:
        context_ids: token ids of the context.
        chunk_tokens: longest chunk.
        first_prompt_ids: repeat prompt of the first chunk.
        later_prompt_ids: repeat prompt of the others.
    """
    for start in range(0, len(context_ids), chunk_tokens):
        end = min(start + chunk_tokens, len(context_ids))
        prompt = first_prompt_ids if start == 0 else later_prompt_ids
        link = context_ids[max(0, start - LINK_TOKENS) : start]
        yield Chunk(start, end, [*prompt, *link, *context_ids[start:end]])


def reconstruction_scores(
    queries: torch.Tensor,
    sink_keys: torch.Tensor,
    chunk_keys: torch.Tensor,
    own_keys: torch.Tensor,
    scale: float,
    query_rows: int = 64,
) -> torch.Tensor:
    """Scores of one chunk's KV pairs in one layer.

    The softmax runs over the sinks, the chunk, and causally over the repeated tokens themselves.

    Args:
        queries: ``[R, H, G, D]``, of the repeat input.
        sink_keys: ``[H, S, D]``, first keys of the context; S is 0 when the chunk holds them.
        chunk_keys: ``[H, C, D]``.
        own_keys: ``[H, R, D]``, keys of the repeat input.
        scale: softmax scale.
        query_rows: queries whose attention is held in memory at once.

    Returns:
        float32 ``[H, C]``, in [0, 1].
    """
    num_sinks, num_chunk = sink_keys.shape[1], chunk_keys.shape[1]
    chunk = slice(num_sinks, num_sinks + num_chunk)
    keys = torch.cat([sink_keys, chunk_keys, own_keys], dim=1).float().transpose(1, 2)
    group = queries.shape[2]
    best = torch.full((keys.shape[0], num_chunk), float("-inf"), device=keys.device)
    for first in range(0, len(queries), query_rows):
        block = queries[first : first + query_rows].float() * scale
        num_rows = len(block)
        num_seen = chunk.stop + first + num_rows
        rows = block.permute(1, 2, 0, 3).flatten(1, 2)  # [H, G * rows, D]
        logits = torch.bmm(rows, keys[:, :, :num_seen])
        future = torch.ones(num_rows, num_rows, dtype=torch.bool, device=keys.device).triu(1)
        logits[:, :, chunk.stop + first :].masked_fill_(future.repeat(group, 1), float("-inf"))
        attention = torch.log_softmax(logits, dim=-1)[:, :, chunk]
        best = best.maximum(attention.amax(dim=1))
    return best.exp()


def scores_from_normaliser(
    queries: torch.Tensor,
    keys: torch.Tensor,
    log_normaliser: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    query_rows: int = 256,
) -> torch.Tensor:
    """The same scores when the softmax's normaliser is known, as a fused attention returns it.

    Products are computed in the dtype of the inputs, as in the original. A logit of a few hundred
    loses its fraction when it is rounded to 16 bits. So the normaliser is subtracted inside the
    product, before rounding: as extra columns of the queries, whose sum is exactly the normaliser.

    Args:
        queries: ``[H, M, D]``, all queries of a head's group.
        keys: ``[H, C, D]``.
        log_normaliser: float32 ``[H, M]``, log of the sum of exponentials of all scaled logits.
        scale: softmax scale.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; they are computed in
            float32 then. None or 0: they stay.
        query_rows: queries whose attention is held in memory at once.

    Returns:
        float32 ``[H, C]``, in [0, 1].
    """
    if soft_cap:
        return _scores_of_capped(queries, keys, log_normaliser, scale, soft_cap, query_rows)
    normaliser = _in_parts(-log_normaliser / scale, queries.dtype)  # [H, M, 3]
    ones = keys.new_ones(*keys.shape[:2], normaliser.shape[2])
    columns = torch.cat([keys, ones], dim=2).transpose(1, 2)
    best = torch.full(keys.shape[:2], float("-inf"), device=queries.device)
    for first in range(0, queries.shape[1], query_rows):
        rows = slice(first, first + query_rows)
        logits = torch.bmm(torch.cat([queries[:, rows], normaliser[:, rows]], dim=2), columns)
        best = best.maximum(logits.amax(dim=1).float())
    return (best * scale).exp().clamp_(max=1.0)


def _scores_of_capped(
    queries: torch.Tensor,
    keys: torch.Tensor,
    log_normaliser: torch.Tensor,
    scale: float,
    soft_cap: float,
    query_rows: int,
) -> torch.Tensor:
    """See :func:`scores_from_normaliser`."""
    columns = keys.float().transpose(1, 2) * scale
    best = torch.full(keys.shape[:2], float("-inf"), device=queries.device)
    for first in range(0, queries.shape[1], query_rows):
        rows = slice(first, first + query_rows)
        logits = cap_logits_(torch.bmm(queries[:, rows].float(), columns), soft_cap)
        best = best.maximum(logits.sub_(log_normaliser[:, rows, None]).amax(dim=1))
    return best.exp_().clamp_(max=1.0)


def _in_parts(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers ``[...]``, each as a sum of three numbers of ``dtype``: ``[..., 3]``."""
    parts = []
    for _ in range(3):
        parts.append(numbers.to(dtype))
        numbers = numbers - parts[-1].float()
    return torch.stack(parts, dim=-1)


def retrieval_fractions(importance: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """Budgets by head: the most important heads keep everything, the others nothing.

    One head between them keeps a part, so that the mean is the keep ratio.

    Args:
        importance: ``[L, H]``.
        keep_ratio: kept / all, in (0, 1].

    Returns:
        float64 ``[L, H]``.
    """
    order = importance.flatten().argsort(descending=True, stable=True)
    fractions = torch.zeros(importance.numel(), dtype=torch.float64)
    rank = torch.arange(importance.numel(), dtype=torch.float64)
    fractions[order] = (keep_ratio * importance.numel() - rank).clamp(0, 1)
    return fractions.view(importance.shape)


def pair_fractions(scores: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """Budgets by KV pair: each head's share of the best pairs over all layers and heads.

    Args:
        scores: ``[L, H, T]``.
        keep_ratio: kept / all, in (0, 1].

    Returns:
        float64 ``[L, H]``; its mean is the keep ratio up to rounding.
    """
    num_kept = max(1, round(keep_ratio * scores.numel()))
    kept = torch.zeros(scores.numel(), dtype=torch.float64)
    kept[scores.flatten().argsort(descending=True, stable=True)[:num_kept]] = 1
    return kept.view(scores.shape).mean(dim=-1)
