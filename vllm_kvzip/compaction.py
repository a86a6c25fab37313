"""Execute a keep plan: copy the kept KV pairs of one layer into whole head pages, out of place.

A head page is one row of a flat pool, ``[2 * N * D]`` elements: N keys, then N values, each in an
element order that the attention kernel chose (:class:`PageCodec`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PageCodec:
    """Element order inside the key half and the value half of a page.

    Attributes:
        key_order: int64 ``[N * D]``; stored element ``i`` is logical element ``key_order[i]`` of
            the row-major ``[N, D]`` keys.
        value_order: the same for values.
    """

    key_order: torch.Tensor
    value_order: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("key_order", "value_order"):
            order = getattr(self, name)
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise ValueError(f"{name} is not a permutation of its {len(order)} elements")

    @classmethod
    def identity(cls, block_size: int, head_dim: int) -> PageCodec:
        """Row-major halves."""
        order = torch.arange(block_size * head_dim)
        return cls(order, order)


class PageStore:
    """Reads and writes head pages of a flat pool in logical order; moves elements bit for bit.

    Args:
        pages: ``[num_pages, 2 * N * D]``, the pool; written in place.
        codec: element order inside a page.
        block_size: N.
        head_dim: D.
    """

    def __init__(
        self, pages: torch.Tensor, codec: PageCodec, block_size: int, head_dim: int
    ) -> None:
        half = block_size * head_dim
        self._pages = pages
        self._block_size = block_size
        self._head_dim = head_dim
        self._stored_order = torch.cat([codec.key_order, codec.value_order + half])
        self._logical_order = self._stored_order.argsort()

    def read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of runs of pages.

        Args:
            page_ids: int64 ``[H, n]``.

        Returns:
            keys and values, each ``[H, n * N, D]`` in the pool's dtype.
        """
        num_heads, num_pages = page_ids.shape
        stored = self._pages.index_select(0, page_ids.flatten())
        logical = stored.index_select(1, self._logical_order)
        halves = logical.view(num_heads, num_pages, 2, self._block_size, self._head_dim)
        keys, values = halves.unbind(dim=2)
        shape = (num_heads, num_pages * self._block_size, self._head_dim)
        return keys.reshape(shape), values.reshape(shape)

    def write(self, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole pages.

        Args:
            page_ids: int64 ``[n]``.
            keys, values: ``[n * N, D]``.
        """
        half = self._block_size * self._head_dim
        logical = torch.cat([keys.reshape(-1, half), values.reshape(-1, half)], dim=1)
        self._pages.index_copy_(0, page_ids, logical.index_select(1, self._stored_order))


def compact_layer(
    store: PageStore,
    source_page_ids: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    target_page_ids: torch.Tensor,
) -> None:
    """Copy the kept KV pairs of one layer into its new pages.

    Args:
        store: the pool.
        source_page_ids: int64 ``[H, nb]``, the prompt's pages of this layer; only read.
        positions: int64 ``[K]``, kept positions, head after head.
        heads: int64 ``[K]``, the head of each.
        target_page_ids: int64 ``[K / N]``, in the same order.

    Raises:
        ValueError: if a page is both source and target.
    """
    if torch.isin(target_page_ids, source_page_ids).any():
        raise ValueError("compaction must not write to the prompt's own pages")
    keys, values = store.read(source_page_ids)
    store.write(target_page_ids, keys[heads, positions], values[heads, positions])
