"""Blocks of the KV cache that may hold NaN, and must be zeros before they are used anew.

Read as numbers, quantized bytes can be NaN, and so can be what a prompt with broken numbers left.
An attention kernel reads whole pages: it may multiply the numbers after a sequence's last token by
zero instead of leaving them out, and NaN times zero is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache


class UncleanBlocks:
    """Remembers them, and writes zeros into them when they are handed out anew.

    Args:
        cache: whose blocks they are.
    """

    def __init__(self, cache: HeadPageCache) -> None:
        self._cache = cache
        self._blocks: set[int] = set()
        self._requests: set[str] = set()  # still running, and writing NaN

    def add(self, blocks: Iterable[int]) -> None:
        """These blocks may hold NaN from now on."""
        self._blocks.update(blocks)

    def add_request(self, request_id: str) -> None:
        """All blocks that a request gets until it is over may hold NaN as well."""
        self._requests.add(request_id)

    def clean(self, given: Iterable[tuple[str, Sequence[int]]], over: set[str]) -> None:
        """Write zeros into the blocks that a step hands out.

        Args:
            given: request id, and the blocks it gets; looked at only where it matters.
            over: ids of requests that are over.
        """
        self._requests -= over
        if not self._blocks and not self._requests:
            return
        given = list(given)
        unclean = [block for _, blocks in given for block in blocks if block in self._blocks]
        if unclean:
            self._blocks.difference_update(unclean)
            pages = self._cache.pool.page_ids(torch.tensor(unclean)).flatten()
            self._cache.pages.index_fill_(0, async_tensor_h2d(pages, self._cache.pages.device), 0)
        for request_id, blocks in given:
            if request_id in self._requests:
                self._blocks.update(blocks)
