"""Rotary position embedding (RoFormer, arXiv 2104.09864), as scorers need it: taking it off again.

Keys lie in the cache after rotation. What a key says of its token shows better before it, and what
later queries will ask shows better at their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvzip.model.slices import token_slices

_NUMBERS_PER_ANGLE = 8  # cosine and sine, their squares, and both divided by the sum


@dataclass(frozen=True)
class RotaryTables:
    """Angles by position, of one model.

    Attributes:
        cos, sin: float32 ``[positions, R / 2]``, R the rotated dimensions of a head, scaled as the
            model scales them.
        interleaved: whether dimensions ``2i, 2i + 1`` are rotated together (GPT-J style), and not
            ``i, i + R / 2``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False

    def unrotate(
        self, x: torch.Tensor, positions: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Take the rotation off.

        Args:
            x: float32 ``[..., T, D]``, rotated keys or queries.
            positions: int64 ``[T]``, or ``[..., T]``.
            out: like ``x``; written and returned, if given.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        square = cos * cos + sin * sin  # 1, unless the model scales its angles' cosines
        return self._turn(x, cos / square, -sin / square, out)

    def rotate_to_mean(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Rotate to each of some positions and take the mean.

        Args:
            x: float32 ``[..., D]``, not rotated.
            first, count: positions ``first`` to ``first + count - 1``; those that the model does
                not have are left out.
        """
        last = min(first + count, len(self.cos))
        rows = slice(min(first, last - 1), last)
        return self._turn(x, self.cos[rows].mean(0), self.sin[rows].mean(0))

    def _turn(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        turned = torch.empty_like(x) if out is None else out
        left, right = self._halves(x, cos.shape[-1])
        new_left, new_right = self._halves(turned, cos.shape[-1])
        torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-1)
        torch.mul(right, cos, out=new_right).addcmul_(left, sin)
        turned[..., 2 * cos.shape[-1] :] = x[..., 2 * cos.shape[-1] :]
        return turned

    def _halves(self, x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the dimensions that are rotated into each other."""
        if self.interleaved:
            return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        return x[..., :half], x[..., half : 2 * half]


def unrotated(
    keys: torch.Tensor, rotary: RotaryTables | None, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys before rotary embedding.

    Args:
        keys: float32 ``[H, T, D]``.
        rotary: of the model; None when it has none, and keys are what they were.
        positions: int64 ``[T]``, or ``[H, T]`` where they differ between heads; None: from 0 on.
    """
    if rotary is None:
        return keys
    if positions is None:
        positions = torch.arange(keys.shape[1], device=keys.device)
    plain = torch.empty_like(keys)
    numbers = _NUMBERS_PER_ANGLE * rotary.cos.shape[1]
    for part in token_slices(keys, numbers * (positions.numel() // max(1, keys.shape[1]))):
        rotary.unrotate(keys[:, part], positions[..., part], out=plain[:, part])
    return plain
