"""Orthonormal Hadamard rotation of vectors, which spreads outliers over all dimensions.

As in QuaRot (arXiv 2404.00456, section 3): keys and queries that are rotated alike keep their dot
products, and a weighted sum of rotated values is rotated back once. A few large dimensions then
no longer decide the scale of a block.

A power of two has Sylvester's matrix. Twelve times a power of two, such as 96, has the Kronecker
product of Paley's matrix of order 12 and Sylvester's: every entry is still plus or minus
``D ** -0.5``, so that an outlier is spread evenly there too.
"""

from __future__ import annotations

import math
from functools import cache

import torch


def hadamard_matrix(order: int) -> torch.Tensor:
    """Orthonormal float64 ``[order, order]``; row-vectors are rotated by ``x @ matrix.T``.

    Raises:
        ValueError: if the order is neither a power of two nor twelve times one.
    """
    base, doublings = _split(order)
    matrix = base
    for _ in range(doublings):
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64))
    return matrix / math.sqrt(order)


def check_rotation(order: int) -> None:
    """Refuse head sizes without a rotation.

    Raises:
        ValueError: if the order is neither a power of two nor twelve times one.
    """
    _split(order)


def has_rotation(order: int) -> bool:
    """Whether :func:`check_rotation` passes."""
    try:
        check_rotation(order)
    except ValueError:
        return False
    return True


def rotate(vectors: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension by the fast Walsh-Hadamard transform, ``D log D`` additions.

    Args:
        vectors: float ``[..., D]``.

    Returns:
        float32, or float64 if the vectors are, like ``vectors``.

    Raises:
        ValueError: if D is neither a power of two nor twelve times one.
    """
    return _transform(vectors, inverse=False)


def rotate_back(vectors: torch.Tensor) -> torch.Tensor:
    """Undo :func:`rotate`."""
    return _transform(vectors, inverse=True)


def _transform(vectors: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    head_dim = vectors.shape[-1]
    base, doublings = _split(head_dim)
    x = vectors if vectors.dtype is torch.float64 else vectors.float()
    width = 1 << doublings
    step = 1
    while step < width:
        halves = x.reshape(*vectors.shape[:-1], head_dim // (2 * step), 2, step)
        first, second = halves.unbind(dim=-2)
        x = torch.stack([first + second, first - second], dim=-2)
        step *= 2
    x = x.reshape(*vectors.shape[:-1], len(base), width)
    if len(base) > 1:
        matrix = (base.T if inverse else base).to(x)
        x = torch.einsum("ij,...jw->...iw", matrix, x)
    return x.reshape(vectors.shape) / math.sqrt(head_dim)


def _split(order: int) -> tuple[torch.Tensor, int]:
    """A small matrix of ones and minus ones, and how often it is doubled."""
    for base in (torch.ones(1, 1, dtype=torch.float64), _paley()):
        times = order // len(base)
        if times and times * len(base) == order and times & (times - 1) == 0:
            return base, times.bit_length() - 1
    raise ValueError(
        f"a head size of {order} has no rotation: it is neither a power of two nor twelve times one"
    )


@cache
def _paley(prime: int = 11) -> torch.Tensor:
    """Paley's first construction: a Hadamard matrix of order ``prime + 1``, ``prime % 4 == 3``."""
    squares = {value * value % prime for value in range(1, prime)}
    rows = [[1] * (prime + 1)]
    for row in range(prime):
        signs = [1 if (column - row) % prime in squares else -1 for column in range(prime)]
        signs[row] = 1
        rows.append([-1, *signs])
    return torch.tensor(rows, dtype=torch.float64)
