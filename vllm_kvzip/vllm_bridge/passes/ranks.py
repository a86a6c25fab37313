"""Tensor-parallel ranks that do something together, and agree on whether it worked.

Every rank must make the same calls in the same order. What fails on one rank then fails on all of
them, with the same words, and nobody waits for a rank that has given up. An error inside the
model is another matter: there the others may be waiting for each other already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.vllm_bridge.symbols import get_tp_group, tensor_model_parallel_all_gather

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Ranks:
    """This rank and the others of its tensor-parallel group."""

    def __init__(self) -> None:
        self._group = get_tp_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return bool(self._group.rank_in_group == 0)

    def together(self, action: Callable[[], T]) -> T:
        """What ``action`` returns here, once it has worked on every rank.

        Raises:
            ProfileError: if it failed on another rank; here its own error.
        """
        result, error = _attempt(action)
        if self._group.world_size > 1:
            said: list[str | None] = [None] * self._group.world_size
            own = None if error is None else _in_words(error)
            torch.distributed.all_gather_object(said, own, group=self._group.cpu_group)
            if error is None and (failed := [words for words in said if words is not None]):
                raise ProfileError(failed[0])
        if error is not None:
            raise error
        return result

    def on_first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, which alone carries it out.

        Raises:
            ProfileError: on other ranks, if it failed there; on the first its own error.
        """
        result, error = _attempt(action) if self.is_first else (None, None)
        if self._group.world_size > 1:
            words = None if error is None else _in_words(error)
            result, words = self._group.broadcast_object((result, words))
            if error is None and words is not None:
                raise ProfileError(words)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def all_heads(self, own: torch.Tensor, dim: int, num_kv_heads: int) -> torch.Tensor:
        """A tensor of all KV heads, in order.

        Args:
            own: of this rank's heads.
            dim: which dimension the heads are.
            num_kv_heads: of the model. Where there are more ranks, heads lie on several.
        """
        if self._group.world_size == 1:
            return own
        gathered = tensor_model_parallel_all_gather(own.contiguous(), dim)
        copies = gathered.shape[dim] // num_kv_heads
        first = torch.arange(0, gathered.shape[dim], copies, device=own.device)
        return gathered.index_select(dim, first)


def _attempt(action: Callable[[], T]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__
