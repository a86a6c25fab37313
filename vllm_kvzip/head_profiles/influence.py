"""How much each KV pair decides what the model says: while it repeats its context, and further on.

KVzip's score of a pair is the most attention it gets while the context is repeated. Attention says
where a head looks, not whether it matters: some heads look hard and change nothing. Here the loss
itself is asked. Let ``a`` be the attention that one query pays to a pair with value ``v``, and
``o`` the head's output for that query. Without the pair the softmax spreads over the others, and
the output changes by exactly ``a / (1 - a) * (o - v)``. To first order the model's log odds of the
right next tokens then change by the product of that and their gradient at the output. A pair's
influence is the root of the sum of squares of these changes over all queries of its query group
(optimal brain damage, LeCun et al. 1990, for KV pairs; the sum of squares is the diagonal of an
empirical Fisher matrix).

Log odds, ``log p - log(1 - p)``, and not ``log p``: a model that repeats well is sure of each
token, and the gradient of ``log p`` vanishes there.

Repeating asks for every token of a context once, as a question about it may. What a text goes on
with asks for what a later token of the same text needs, as an answer does that is still being
written. Pairs that only one of them needs are many, so both are measured.

One backward pass gives the gradients of all heads, so influence is for training (scorer
``surrogate``), not for serving.
"""

from __future__ import annotations

import torch


def log_odds(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log odds of given next tokens.

    Args:
        logits: ``[R, V]``.
        tokens: int64 ``[R]``.

    Returns:
        float32 ``[R]``.
    """
    logits, column = logits.float(), tokens[:, None]
    others = logits.scatter(1, column, float("-inf")).logsumexp(dim=-1)
    return logits.gather(1, column).squeeze(1) - others


def influence_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    outputs: torch.Tensor,
    gradients: torch.Tensor,
    scale: float,
    pairs: slice,
    query_rows: int = 256,
) -> torch.Tensor:
    """Influence of some KV pairs of one layer.

    Args:
        queries: ``[Hq, R, D]``; the query group of KV head h is ``Hq / H`` neighbours.
        keys: ``[H, K, D]``, of all tokens that the last query sees; the last R are the queries'.
        values: ``[H, K, D]``.
        outputs: ``[Hq, R, D]``, of the attention.
        gradients: ``[Hq, R, D]``, of the sum of the log odds at these outputs.
        scale: softmax scale.
        pairs: which of the K pairs.
        query_rows: queries whose attention is held in memory at once.

    Returns:
        float32 ``[H, pairs]``, not negative.
    """
    num_heads, num_keys = keys.shape[:2]
    num_rows, group = queries.shape[1], len(queries) // num_heads
    columns, values = keys.float().transpose(1, 2), values.float()
    wanted = values[:, pairs].transpose(1, 2)
    total = torch.zeros(num_heads, wanted.shape[2], device=keys.device)
    for first in range(0, num_rows, query_rows):
        rows = slice(first, first + query_rows)
        block, out, slope = (
            part[:, rows].float().reshape(num_heads, group, -1, part.shape[2])
            for part in (queries, outputs, gradients)
        )  # [H, G, r, D]
        shape = num_heads, group, block.shape[2]
        logits = torch.bmm(block.flatten(1, 2) * scale, columns).view(*shape, -1)
        seen = num_keys - num_rows + 1 + torch.arange(first, first + shape[2])
        future = torch.arange(num_keys) >= seen[:, None]
        logits.masked_fill_(future.to(keys.device), float("-inf"))
        attention = logits.softmax(dim=-1)[..., pairs]
        change = torch.bmm(slope.flatten(1, 2), wanted).view(*shape, -1)
        change -= (slope * out).sum(dim=-1, keepdim=True)
        change *= attention / (1 - attention).clamp_(min=0.5)  # all but the first are below 0.5
        first_pair = logits.argmax(dim=-1, keepdim=True)
        without = logits.scatter_(-1, first_pair, float("-inf")).softmax(dim=-1).nan_to_num_(0.0)
        other_out = torch.bmm(without.flatten(1, 2), values).view(*shape, -1)
        exact = (slope * (other_out - out)).sum(dim=-1, keepdim=True)
        place = first_pair - pairs.start
        inside = (place >= 0) & (place < change.shape[-1])
        place.clamp_(0, change.shape[-1] - 1)
        change.scatter_(-1, place, torch.where(inside, exact, change.gather(-1, place)))
        total += change.square_().sum(dim=(1, 2))
    return total.sqrt_()
