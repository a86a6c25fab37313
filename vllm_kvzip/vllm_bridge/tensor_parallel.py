"""Which of the model's KV heads a tensor-parallel rank has."""

from __future__ import annotations


def first_kv_head(rank: int, num_ranks: int, total_num_kv_heads: int) -> int:
    """The first KV head of a rank.

    vLLM deals them out in order. Where there are more ranks than KV heads, each head lies on as
    many ranks that follow each other, with a part of its query heads on each.

    Args:
        rank: of ``num_ranks``.
        num_ranks: tensor-parallel size; it divides the number of KV heads or is a multiple of it.
        total_num_kv_heads: of the model.
    """
    return rank * total_num_kv_heads // num_ranks


def can_share(num_ranks: int, total_num_kv_heads: int) -> bool:
    """Whether vLLM can deal KV heads out to so many ranks."""
    few, many = sorted((num_ranks, total_num_kv_heads))
    return few == 0 or many % few == 0  # models without attention have no heads
