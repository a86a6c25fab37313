"""Head pages whose rows are tokens, key and value side by side, as vLLM's GPU kernels want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.kernels.compaction import compact_pages

if TYPE_CHECKING:
    from vllm_kvzip.core import KeepPlan


class RowPages:
    """A :class:`~vllm_kvzip.compaction.PageStore` over such a pool; nothing waits for the device.

    Args:
        pages: ``[num_pages, N * 2 * D]``, the pool; written in place.
        block_size: N.
        head_dim: D.
    """

    def __init__(self, pages: torch.Tensor, block_size: int, head_dim: int) -> None:
        self.device = pages.device
        rows = pages.view(len(pages), block_size, 2, head_dim)
        self._keys, self._values = rows[:, :, 0], rows[:, :, 1]

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all pages, ``[num_pages, N, D]``, without a copy."""
        return self._keys, self._values

    def read_keys(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Pages ``[H, n]`` as ``[H, n * N, D]``, a copy."""
        return self._keys[page_ids].flatten(1, 2)

    def read_values(self, page_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`read_keys`."""
        return self._values[page_ids].flatten(1, 2)

    def compact(self, sources: torch.Tensor, keep: KeepPlan, targets: torch.Tensor) -> None:
        """See :meth:`~vllm_kvzip.compaction.PageStore.compact`; one launch for all layers."""
        by_head = sources.flatten(0, 1).to(torch.int32)
        heads = torch.arange(len(by_head), dtype=torch.int32, device=self.device)
        compact_pages(
            self._keys,
            self._values,
            by_head,
            keep.positions.to(torch.int32),
            heads.repeat_interleave(keep.pages.flatten(), output_size=len(targets)),
            targets.to(torch.int32),
        )
