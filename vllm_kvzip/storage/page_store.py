"""Execute a keep plan: copy the kept KV pairs of a request into whole head pages, out of place.

A head page is one row of a flat pool, ``[2 * N * D]`` elements in an order that the attention
kernel chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_kvzip.core import EarlierPages, KeepPlan
    from vllm_kvzip.model.key_transform import KeyTransform


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


class PageStore(Protocol):
    """Reads and compacts head pages of a flat pool; moves what is stored bit for bit.

    Attributes:
        device: where the pool lies.
    """

    device: torch.device

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all pages, ``[num_pages, N, D]``, without a copy.

        Raises:
            ValueError: when pages are stored in an order that is no such view.
        """
        ...

    def read_keys(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys of runs of pages.

        Args:
            page_ids: int64 ``[H, n]``, of every KV head of a layer.
            layer: which one.

        Returns:
            ``[H, n * N, D]`` in the dtype of the model, a copy.
        """
        ...

    def read_values(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Values of runs of pages; see :meth:`read_keys`."""
        ...

    def compact(self, sources: torch.Tensor, keep: KeepPlan, targets: torch.Tensor) -> None:
        """Copy the kept KV pairs of one request into whole pages.

        Args:
            sources: int64 ``[L, H, n]``, the prompt's pages; only read.
            keep: what each head keeps; all pages are full.
            targets: int64 ``[sum of pages]``, in the order of ``keep``.
        """
        ...

    def quantize(
        self,
        sources: torch.Tensor,
        keep: KeepPlan,
        targets: torch.Tensor,
        transform: KeyTransform,
        earlier: EarlierPages | None = None,
    ) -> torch.Tensor:
        """Quantize KV pairs of one request into whole pages.

        Args:
            sources: int64 ``[L, H, n]``, the prompt's pages; only read.
            keep: what each head keeps quantized.
            targets: int64, head pages; their quantized pages are filled in the order of ``keep``.
            transform: ``[L, H, D]``, what keys are freed of.
            earlier: quantized pages that an earlier compression filled with the same transform;
                positions count their tokens first, and what lies there stays what it is. None: the
                positions are those of the prompt.

        Returns:
            int64 ``[sum of pages]``, ids of the quantized pages.
        """
        ...


class PagePacker(Protocol):
    """Makes quantized pages; see ``quantization/choice.py``."""

    def pages_of(self, head_pages: torch.Tensor) -> torch.Tensor:
        """A pool of head pages as quantized ones, without a copy."""
        ...

    def page_ids(self, head_page_ids: torch.Tensor) -> torch.Tensor:
        """The quantized pages of some head pages, in order."""
        ...

    def turn(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors ``[..., D]`` as pages hold them."""
        ...

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Quantize tokens that fill whole pages.

        Args:
            keys, values: float32 ``[n, Q, D]``, turned.

        Returns:
            uint8 ``[n, page_bytes]``.
        """
        ...

    def decode(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as :meth:`encode` took them, float32 ``[n, Q, D]``."""
        ...


class PackedPages:
    """A :class:`PageStore` over pages of N keys, then N values, each in an order of its own.

    Args:
        pages: ``[num_pages, 2 * N * D]``, the pool; written in place.
        codec: element order inside a page.
        block_size: N.
        head_dim: D.
        packer: for :meth:`quantize`; None where that is never called.
    """

    def __init__(
        self,
        pages: torch.Tensor,
        codec: PageCodec,
        block_size: int,
        head_dim: int,
        packer: PagePacker | None = None,
    ) -> None:
        self.device = pages.device
        self._quantized = None if packer is None else packer.pages_of(pages)
        self._packer = packer
        keys, values = pages.view(len(pages), 2, block_size * head_dim).unbind(dim=1)
        self._keys = _HalfPages(keys, codec.key_order, block_size, head_dim)
        self._values = _HalfPages(values, codec.value_order, block_size, head_dim)

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`PageStore`."""
        return self._keys.view(), self._values.view()

    def read_keys(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`PageStore`; the same of any layer."""
        return self._keys.read(page_ids)

    def read_values(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """See :meth:`read_keys`."""
        return self._values.read(page_ids)

    def write(self, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole pages.

        Args:
            page_ids: int64 ``[n]``.
            keys, values: ``[n, N, D]``, or these tokens in any other shape.
        """
        self._keys.write(page_ids, keys)
        self._values.write(page_ids, values)

    def compact(self, sources: torch.Tensor, keep: KeepPlan, targets: torch.Tensor) -> None:
        """See :class:`PageStore`; layer by layer, so that only one layer's KV is copied at a time.

        Raises:
            ValueError: if a page is both source and target.
        """
        _check_apart(sources, targets)
        for layer, heads, own in _by_layer(keep):
            index = heads[:, None], keep.positions[own]
            pages = sources[layer]
            self.write(targets[own], self._keys.read(pages)[index], self._values.read(pages)[index])

    def quantize(
        self,
        sources: torch.Tensor,
        keep: KeepPlan,
        targets: torch.Tensor,
        transform: KeyTransform,
        earlier: EarlierPages | None = None,
    ) -> torch.Tensor:
        """See :class:`PageStore`; layer by layer.

        Raises:
            ValueError: if a page is both source and target.
        """
        _check_apart(sources, targets)
        assert self._packer is not None and self._quantized is not None
        packer = self._packer
        targets = packer.page_ids(targets)[: len(keep.positions)]
        if earlier is not None:
            _check_apart(earlier.ids, targets)
        for layer, heads, own in _by_layer(keep):
            positions = keep.positions[own]
            width = 0 if earlier is None else earlier.ids.shape[2] * positions.shape[1]
            keys, values = (
                read(sources[layer])[heads[:, None], (positions - width).clamp(min=0)].float()
                for read in (self._keys.read, self._values.read)
            )
            of_heads = transform.at(layer).at(heads)
            if earlier is None:
                keys = of_heads.apply(keys, positions)
            else:
                keys = of_heads.centred(keys).masked_fill_(positions[..., None] < 0, 0.0)
            values.masked_fill_(positions[..., None] < 0, 0.0)
            turned = packer.turn(keys), packer.turn(values)
            if earlier is not None and width:
                stored = packer.decode(self._quantized[earlier.ids[layer].flatten()])
                keys, values = (
                    _where_earlier(positions, heads, half.view(-1, width, half.shape[2]), own_half)
                    for half, own_half in zip(stored, turned, strict=True)
                )
                turned = keys, values
            self._quantized[targets[own]] = packer.encode(*turned)
        return targets


def _by_layer(keep: KeepPlan) -> Iterator[tuple[int, torch.Tensor, slice]]:
    """Layers that keep something: number, the KV head of each page, and which pages those are."""
    bounds = [0, *keep.pages.sum(dim=1).cumsum(0).tolist()]
    for layer, pages in enumerate(keep.pages):
        own = slice(bounds[layer], bounds[layer + 1])
        if own.start < own.stop:
            yield layer, torch.arange(len(pages)).repeat_interleave(pages), own


def _where_earlier(
    positions: torch.Tensor, heads: torch.Tensor, earlier: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """Tokens ``[n, Q, D]``: of ``earlier`` ``[H, T, D]`` up to position T, else of ``new``."""
    num_tokens = earlier.shape[1]
    found = earlier[heads[:, None], positions.clamp(min=0, max=num_tokens - 1)]
    is_earlier = (positions >= 0) & (positions < num_tokens)
    return torch.where(is_earlier[..., None], found, new)


def _check_apart(sources: torch.Tensor, targets: torch.Tensor) -> None:
    if torch.isin(targets, sources).any():
        raise ValueError("compaction must not write to the prompt's own pages")


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
        row_major = torch.arange(len(order))
        self._by_token = torch.equal(order, row_major)
        by_dimension = row_major.view(block_size, head_dim).t().flatten()
        self._by_dimension = torch.equal(order, by_dimension)
        self._order, self._inverse = order, order.argsort()

    def view(self) -> torch.Tensor:
        """All pages as ``[num_pages, N, D]``, without a copy."""
        _, block_size, head_dim = self._shape
        if self._by_token:
            return self._stored.view(self._shape)
        if self._by_dimension:
            return self._stored.view(-1, head_dim, block_size).transpose(1, 2)
        raise ValueError("pages are stored in blocks of elements, which is no view of [N, D]")

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
        """``[n, N, D]``, or ``[n * N, D]``, into pages ``[n]``."""
        pages = logical.reshape(self._shape)
        if self._by_dimension:
            stored = pages.transpose(1, 2).flatten(1)
        elif self._by_token:
            stored = pages.flatten(1)
        else:
            stored = pages.flatten(1).index_select(1, self._order)
        self._stored.index_copy_(0, page_ids, stored)
