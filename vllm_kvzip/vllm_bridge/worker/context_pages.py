"""Worker side: the pages of a compressed prefix as tensors that another machine can use, and back.

Names and shapes of the tensors; L layers, H KV heads, D head dim, N tokens of a page, n pages, W
first tokens:

    full.pages         int64 [L, H], pages of each head of KV pairs as they are
    full.keys          [n, N, D] in the dtype of the cache (uint8 where numbers have 8 bits)
    full.values        likewise
    scores             float32 [n * N], with a budget in tokens only
    positions          int32 [n * N], in place of scores where the scorer sees everything anew
    quantized.pages    int64 [L, H], in modes ``quantize`` and ``mixed``
    quantized.bytes    uint8 [n, page bytes], as they are stored
    quantized.scores   float32 [n * Q], with budgets in tokens only
    key.mean, key.scale, key.first    float32 [L, H, D], [L, H, D], [L, H, W, D]

Keys and values are in logical order: a CPU's kernel packs them as its instruction set likes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch

from vllm_kvzip.core import CompressedPrefix, StoredTier
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.storage.head_pages import deal_pages
from vllm_kvzip.vllm_bridge.worker.prefixes import KeptRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.cache.unclean_blocks import UncleanBlocks
    from vllm_kvzip.vllm_bridge.worker.prefixes import WorkerPrefixes

FULL, QUANTIZED, SCORES, POSITIONS = "full", "quantized", "scores", "positions"
QUANTIZED_SCORES = f"{QUANTIZED}.scores"
TRANSFORM = ("key.mean", "key.scale", "key.first")
PAGES_AT_ONCE = 4096
"""Pages that are copied by one call; bounds what lies on the device beside the cache."""


class _WritablePages(Protocol):
    """A store whose pages are no view of ``[N, D]``."""

    def write(self, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None: ...


class ContextPages:
    """Reads and writes the pages of cached runs.

    Args:
        cache: where they lie.
        prefixes: which pages belong to a run.
        unclean: blocks that may hold NaN.
    """

    def __init__(
        self, cache: HeadPageCache, prefixes: WorkerPrefixes, unclean: UncleanBlocks
    ) -> None:
        self._cache = cache
        self._prefixes = prefixes
        self._unclean = unclean

    def read(self, serial: int) -> dict[str, torch.Tensor] | None:
        """A run as tensors on the CPU; None where it has not been compressed."""
        run = self._prefixes.kept(serial)
        if run is None:
            return None
        prefix = run.prefix
        keys, values = self._read(prefix.page_ids)
        found = {f"{FULL}.pages": prefix.pages, f"{FULL}.keys": keys, f"{FULL}.values": values}
        if prefix.scores is not None:
            found[SCORES] = prefix.scores
        if prefix.positions is not None:
            found[POSITIONS] = prefix.positions
        if (tier := prefix.quantized) is not None:
            found[f"{QUANTIZED}.pages"] = tier.pages
            stored = self._quantized_pages()
            parts = [stored[some].cpu() for some in tier.page_ids.split(PAGES_AT_ONCE)]
            found[f"{QUANTIZED}.bytes"] = torch.cat(parts)
            if prefix.quantized_scores is not None:
                found[QUANTIZED_SCORES] = prefix.quantized_scores
        if (of_keys := prefix.key_transform) is not None:
            found |= zip(TRANSFORM, (of_keys.mean, of_keys.scale, of_keys.first), strict=True)
        return {name: tensor.cpu() for name, tensor in found.items()}

    def write(
        self,
        serial: int,
        plan: PrefixPlan,
        seed: int,
        block_ids: Sequence[int],
        tensors: dict[str, torch.Tensor],
    ) -> str | None:
        """Write a run into blocks; later steps may start from it.

        Args:
            serial: of the run, from now on.
            plan: of its compression.
            seed: of its tokens.
            block_ids: blocks that nobody uses.
            tensors: as :meth:`read` gave them.

        Returns:
            why they are refused, where nothing has been written; else None.
        """
        device = self._cache.store.device
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=device)
        per_block = self._cache.pool.page_ids(blocks[:1]).numel()
        if len(block_ids) != plan.num_compressed_blocks:
            return "it names another number of blocks"
        if (refusal := self._refusal(plan, tensors, per_block)) is not None:
            return refusal
        small = {
            name: tensor.to(device)
            for name, tensor in tensors.items()
            if name.endswith(".pages") or name in (SCORES, POSITIONS, QUANTIZED_SCORES, *TRANSFORM)
        }
        targets = deal_pages(blocks, plan.num_compressed_blocks * per_block, self._cache.pool)
        full, rest = targets.split(
            [plan.num_full_blocks * per_block, plan.num_quantized_blocks * per_block]
        )
        self._write(full, tensors[f"{FULL}.keys"], tensors[f"{FULL}.values"])
        tiers = [StoredTier(full, small[f"{FULL}.pages"])]
        transform = None
        if plan.num_quantized_blocks:
            assert self._cache.quantization is not None
            self._unclean.add(block_ids[plan.num_full_blocks :])
            pages = self._cache.quantization.page_ids(rest)[: len(tensors[f"{QUANTIZED}.bytes"])]
            stored = self._quantized_pages()
            for some, of_file in _parts(pages, tensors[f"{QUANTIZED}.bytes"]):
                stored[some] = of_file.to(device)
            tiers.append(StoredTier(pages, small[f"{QUANTIZED}.pages"], plan.quantized_split))
            transform = KeyTransform(*(small[name] for name in TRANSFORM))
        prefix = CompressedPrefix(
            tuple(tiers),
            small.get(SCORES),
            transform,
            positions=small.get(POSITIONS),
            quantized_scores=small.get(QUANTIZED_SCORES),
        )
        self._prefixes.keep(serial, KeptRun(prefix, plan, seed))
        return None

    def _refusal(
        self, plan: PrefixPlan, tensors: dict[str, torch.Tensor], per_block: int
    ) -> str | None:
        """What is wrong with tensors; None where nothing is."""
        geometry = self._cache.geometry
        heads = (geometry.num_layers, geometry.num_kv_heads)
        num_full = plan.num_full_blocks * per_block
        num_quantized = plan.num_quantized_blocks * per_block * plan.quantized_split
        dtype, page_tokens = self._dtype, self._page_tokens
        half = dtype, (num_full, page_tokens, geometry.head_dim)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{FULL}.pages": (torch.int64, heads),
            f"{FULL}.keys": half,
            f"{FULL}.values": half,
        }
        if SCORES in tensors:
            wanted[SCORES] = torch.float32, (num_full * page_tokens,)
        if POSITIONS in tensors:
            wanted[POSITIONS] = torch.int32, (num_full * page_tokens,)
        totals = {FULL: num_full}
        if num_quantized:
            if plan.start_blocks:  # last pages that no head could fill may be missing
                of_heads = tensors.get(f"{QUANTIZED}.pages", torch.zeros(0))
                num_quantized = min(num_quantized, int(of_heads.sum()))
            quantization = self._cache.quantization
            if quantization is None:
                return "it has quantized pages"
            layout = quantization.layout
            told = plan.quantized_split, plan.quantized_page_tokens
            if told != (quantization.split, layout.page_tokens):
                return "its quantized pages hold another number of tokens"
            page_bytes = layout.page_bytes
            vectors = (*heads, geometry.head_dim)
            first = (*heads, self._cache.num_first, geometry.head_dim)
            wanted[f"{QUANTIZED}.pages"] = torch.int64, heads
            wanted[f"{QUANTIZED}.bytes"] = torch.uint8, (num_quantized, page_bytes)
            shapes = vectors, vectors, first
            wanted |= zip(TRANSFORM, ((torch.float32, shape) for shape in shapes), strict=True)
            totals[QUANTIZED] = num_quantized
            if SCORES in tensors:
                wanted[QUANTIZED_SCORES] = torch.float32, (num_quantized * layout.page_tokens,)
        if tensors.keys() != wanted.keys():
            return f"it has the tensors {sorted(tensors)}, not {sorted(wanted)}"
        for name, (of_dtype, shape) in wanted.items():
            if tensors[name].dtype != of_dtype or tensors[name].shape != shape:
                return f"its {name} is not {of_dtype} of shape {shape}"
        if (at := tensors.get(POSITIONS)) is not None and at.numel():
            if int(at.min()) < 0 or int(at.max()) >= plan.boundary_tokens:
                return "its positions are not all before its boundary"
        for tier, total in totals.items():
            pages = tensors[f"{tier}.pages"]
            if int(pages.min()) < 0 or int(pages.sum()) != total:
                return f"the pages of its heads are not {total} in all"
        return None

    @property
    def _dtype(self) -> torch.dtype:
        """Of keys and values in a file."""
        return torch.uint8 if self._cache.scales is not None else self._cache.pages.dtype

    @property
    def _page_tokens(self) -> int:
        """N."""
        return self._cache.pages[0].numel() // (2 * self._cache.geometry.head_dim)

    def _quantized_pages(self) -> torch.Tensor:
        """The pool as quantized pages, uint8 ``[num_pages * split, page bytes]``, no copy."""
        assert self._cache.quantization is not None
        return self._cache.quantization.pages_of(self._cache.pages)

    def _read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are stored, ``[n, N, D]`` each, copies on the CPU."""
        parts = [self._read_some(some) for some in page_ids.split(PAGES_AT_ONCE)]
        keys, values = (torch.cat(halves) for halves in zip(*parts, strict=True))
        return keys, values

    def _read_some(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(page_ids), self._page_tokens, self._cache.geometry.head_dim)
        store = self._cache.store
        if self._cache.scales is None:
            keys, values = (
                read(page_ids[None], 0).reshape(shape).cpu()
                for read in (store.read_keys, store.read_values)
            )
            return keys, values
        keys, values = (half.view(torch.uint8)[page_ids].cpu() for half in store.views())
        return keys, values

    def _write(self, page_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill whole pages; see :meth:`_read`."""
        store = self._cache.store
        for some, of_keys, of_values in _parts(page_ids, keys, values):
            halves = of_keys.to(store.device), of_values.to(store.device)
            if hasattr(store, "write"):
                cast("_WritablePages", store).write(some, *halves)
                continue
            for half, logical in zip(store.views(), halves, strict=True):
                half.view(logical.dtype)[some] = logical


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of as many pages, some pages at a time."""
    return zip(*(tensor.split(PAGES_AT_ONCE) for tensor in tensors), strict=True)
