"""Queries and keys whose logits all have a large number in common."""

import torch


def shifted_case(dtype, shift=600.0, heads=2, rows=48, num_keys=96, dim=64):
    """Queries ``[H, M, D]``, keys ``[H, C, D]``, and scores and log normalisers in float64."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(heads, rows, dim, generator=generator)
    keys = torch.randn(heads, num_keys, dim, generator=generator)
    scale = dim**-0.5
    keys[..., :2] = 64.0
    queries[..., :2] = shift / (2 * 64.0 * scale) * (1 + 0.1 * queries[..., :2])
    queries, keys = queries.to(dtype), keys.to(dtype)
    logits = queries.double() @ keys.double().transpose(1, 2) * scale
    assert logits.abs().amin() > shift / 2
    return queries, keys, logits.softmax(dim=-1).amax(dim=1), logits.logsumexp(dim=-1)


def rank_correlation(first, second):
    """Of Spearman."""
    ranks = [scores.flatten().argsort().argsort().double() for scores in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
