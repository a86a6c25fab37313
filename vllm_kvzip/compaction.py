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


def is_by_token(order: torch.Tensor) -> bool:
    """Whether half a page stores its tokens one after the other, row-major ``[N, D]``."""
    return torch.equal(order, torch.arange(len(order)))


def is_by_dimension(order: torch.Tensor, block_size: int, head_dim: int) -> bool:
    """Whether half a page stores one dimension of all tokens after the other, ``[D, N]``."""
    return torch.equal(order, torch.arange(len(order)).view(block_size, head_dim).t().flatten())


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
        keys, values = pages.view(len(pages), 2, block_size * head_dim).unbind(dim=1)
        self._keys = _HalfPages(keys, codec.key_order, block_size, head_dim)
        self._values = _HalfPages(values, codec.value_order, block_size, head_dim)

    def read_keys(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Keys of runs of pages.

        Args:
            page_ids: int64 ``[H, n]``.

        Returns:
            ``[H, n * N, D]`` in the pool's dtype, a copy.
        """
        return self._keys.read(page_ids)

    def read_values(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Values of runs of pages; see :meth:`read_keys`."""
        return self._values.read(page_ids)

    def write(self, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole pages.

        Args:
            page_ids: int64 ``[n]``.
            keys, values: ``[n * N, D]``.
        """
        self._keys.write(page_ids, keys)
        self._values.write(page_ids, values)


class _HalfPages:
    """The key halves, or the value halves, of all pages.

    The two orders in use, token by token and dimension by dimension, are read and written through
    views; any other order costs a gather per element.
    """

    def __init__(
        self, stored: torch.Tensor, order: torch.Tensor, block_size: int, head_dim: int
    ) -> None:
        self._stored = stored  # [num_pages, N * D]
        self._shape = (-1, block_size, head_dim)
        self._by_token = is_by_token(order)
        self._by_dimension = is_by_dimension(order, block_size, head_dim)
        self._order, self._inverse = order, order.argsort()

    def read(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Pages ``[H, n]`` as ``[H, n * N, D]``."""
        stored = self._stored.index_select(0, page_ids.flatten())
        _, block_size, head_dim = self._shape
        if self._by_dimension:
            logical = stored.view(-1, head_dim, block_size).transpose(1, 2)
        elif self._by_token:
            logical = stored.view(self._shape)
        else:
            logical = stored.index_select(1, self._inverse).view(self._shape)
        num_heads, num_pages = page_ids.shape
        return logical.reshape(num_heads, num_pages * block_size, head_dim)

    def write(self, page_ids: torch.Tensor, logical: torch.Tensor) -> None:
        """``[n * N, D]`` into pages ``[n]``."""
        pages = logical.reshape(self._shape)
        if self._by_dimension:
            stored = pages.transpose(1, 2).flatten(1)
        elif self._by_token:
            stored = pages.flatten(1)
        else:
            stored = pages.flatten(1).index_select(1, self._order)
        self._stored.index_copy_(0, page_ids, stored)


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
    keys = store.read_keys(source_page_ids)[heads, positions]
    values = store.read_values(source_page_ids)[heads, positions]
    store.write(target_page_ids, keys, values)
