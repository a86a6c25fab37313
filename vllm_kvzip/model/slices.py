"""Work on a long prompt in parts, so that what lies beside its keys has a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def group_slices(keys: torch.Tensor, group_size: int, numbers_per_member: int) -> Iterator[slice]:
    """Parts of a query group, in order; what is made of one part is never more than the keys.

    A part has one member at least.

    Args:
        keys: float32 ``[H, T, D]``.
        group_size: G.
        numbers_per_member: float32 numbers that exist at once, of all heads, for each member.
    """
    yield from _slices(group_size, keys.numel() // max(1, numbers_per_member))


def token_slices(keys: torch.Tensor, numbers_per_token: int) -> Iterator[slice]:
    """Parts of a prompt's tokens, in order; what is made of one part is never more than the keys.

    A part has one token at least. How many parts there are depends on the model's shape, not on
    the prompt's length.

    Args:
        keys: float32 ``[H, T, D]``.
        numbers_per_token: float32 numbers that exist at once, of all heads, for each token of a
            part.
    """
    yield from _slices(keys.shape[1], keys.numel() // max(1, numbers_per_token))


def _slices(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
