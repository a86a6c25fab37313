"""Which kernel attends over compressed prefixes on this card: ours or vLLM's. Measured at start-up.

Both are timed on the same sample of a decode step over the engine's own cache, whose contents do
not matter. Such batches also compile our kernels, so that no request waits for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.page_tables import PageTables
from vllm_kvzip.kernels.quantized_pages import quantize_pages
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatch
from vllm_kvzip.vllm_bridge.attention.stock_head_sequences import StockHeadSequences, fits
from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata, init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.vllm_bridge.attention.batches import AttendingBatch
    from vllm_kvzip.vllm_bridge.attention.gpu_attention import HeadPageGPUBuilder
    from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher

logger = init_logger("vllm." + __name__)

REQUESTS, CONTEXT_TOKENS, KEEP_RATIO = 32, 8192, 0.25  # of the sample batch
WARM_UPS, RUNS = 3, 10


@dataclass(frozen=True)
class SampleBatch:
    """Requests that are all alike, each with a compressed prefix and some tokens after it.

    Attributes:
        batch: as our kernel takes it.
        common: vLLM's metadata of it.
        query, output: ``[tokens, H * G, D]``.
    """

    batch: KernelBatch
    common: CommonAttentionMetadata
    query: torch.Tensor
    output: torch.Tensor


def make_sample_batch(
    batcher: KernelBatcher,
    geometry: CacheGeometry,
    *,
    num_requests: int,
    context_tokens: int,
    num_blocks: int,
    query_len: int = 1,
) -> SampleBatch:
    """A batch over the first blocks of the cache.

    Args:
        batcher: of the engine.
        geometry: of the cache.
        num_requests: R.
        context_tokens: of each request, before compression; a quarter is kept.
        num_blocks: of the cache; requests share blocks when there are few.
        query_len: tokens of each request in this step.
    """
    keys, _ = batcher.pages
    device, size = keys.device, geometry.block_size
    prefix_blocks = max(1, context_tokens // size)
    prefix_pages = prefix_blocks * geometry.pages_per_head
    kept = max(1, round(KEEP_RATIO * prefix_blocks)) * geometry.pages_per_head
    width = prefix_blocks + -(-query_len // size)
    table = torch.arange(num_requests * width, dtype=torch.int32, device=device) % num_blocks
    table = table.view(num_requests, width)
    seq_len = prefix_blocks * size + query_len
    seq_lens = torch.full((num_requests,), seq_len, dtype=torch.int32, device=device)
    starts = torch.arange(num_requests + 1, dtype=torch.int32) * query_len
    heads = torch.arange(geometry.num_heads + 1, dtype=torch.int32, device=device)
    quantized = transforms = None  # what else they have
    if batcher.quantized is not None:
        left = (prefix_pages - kept) * geometry.page_tokens
        rest = -(-left // batcher.quantized.layout.page_tokens)
        quantized = (batcher.quantized_split * kept * geometry.num_heads + rest * heads)[None]
        shape = (1, geometry.num_heads, 2 + batcher.num_first, geometry.head_dim)
        transforms = torch.ones(shape, dtype=torch.float32, device=device)
    tables = PageTables(
        offsets=kept * heads[None],
        boundary_pages=torch.full((1,), prefix_pages, dtype=torch.int32, device=device),
        slots=torch.zeros(num_requests, dtype=torch.int32, device=device),
        block_table=table,
        seq_lens=seq_lens,
        place=batcher.place,
        num_kv_heads=geometry.num_kv_heads,
        page_tokens=geometry.page_tokens,
        quantized_offsets=quantized,
        key_transforms=transforms,
        split=batcher.quantized_split,
    )
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=num_requests,
        num_actual_tokens=num_requests * query_len,
        max_query_len=query_len,
        max_seq_len=seq_len,
        block_table_tensor=table,
        slot_mapping=torch.full((num_requests * query_len,), -1, device=device),
    )
    num_query_heads = geometry.num_kv_heads * geometry.group_size
    query = torch.zeros(
        num_requests * query_len, num_query_heads, geometry.head_dim,
        dtype=batcher.query_dtype, device=device,
    )  # fmt: skip
    batch = KernelBatch(
        batcher.pages, tables, common.query_start_loc, query_len, seq_len, batcher.layer_index,
        batcher.quantized, batcher.scales,
    )  # fmt: skip
    return SampleBatch(batch, common, query, torch.empty_like(query, dtype=batcher.dtype))


def warm_up(
    batcher: KernelBatcher, geometry: CacheGeometry, layer: Any, num_blocks: int, most_tokens: int
) -> None:
    """Compile our kernels before a request or a CUDA graph needs them.

    Attention for few and for many query tokens, in one run and in several; compaction of block 0,
    which holds nothing, into itself; scores.
    """
    group = geometry.group_size
    query_lens = {1, *(-(-rows // group) for rows in (17, 33, 65))}  # tiles of 16, 32, 64; two
    for query_len in query_lens:
        for context_tokens in {2 * geometry.block_size, most_tokens}:
            sample = make_sample_batch(
                batcher, geometry, num_requests=2, context_tokens=context_tokens,
                num_blocks=num_blocks, query_len=query_len,
            )  # fmt: skip
            sample.batch.attend(layer.impl, layer, sample.query, sample.output)
    keys, values = batcher.pages
    zeros = torch.zeros(geometry.page_tokens, dtype=torch.int32, device=keys.device)
    stored = (half.view(torch.uint8) if batcher.scales else half for half in (keys, values))
    compact_pages(*stored, zeros[:1, None], zeros, zeros[:1], zeros[:1])
    if (chosen := batcher.quantized) is not None:
        dense = torch.zeros(1, geometry.head_dim, device=keys.device)
        empty = torch.full((1, chosen.layout.page_tokens), -1, device=keys.device)
        page = torch.zeros(1, dtype=torch.int64, device=keys.device)
        quantize_pages(dense, dense, empty, chosen.pages, page, chosen.layout, chosen.code_book)
        chosen.pages[0].zero_()  # of block 0, which a kernel may read as numbers
    rows = keys[0][None].to(batcher.dtype).contiguous()
    impl = layer.impl
    column_maximum(rows, rows, rows[:, :, 0].float(), impl.scale, impl.logits_soft_cap)


def vllms_kernel_is_faster(
    sample: SampleBatch, builder: HeadPageGPUBuilder, pages: torch.Tensor, layer: Any, clock: Clock
) -> bool:
    """Time one layer of a sample batch by either kernel; what vLLM's tables take is counted.

    Args:
        sample: see :func:`make_sample_batch`.
        builder: makes vLLM's metadata.
        pages: the pool as vLLM's kernel wants a cache.
        layer: any attention layer.
        clock: of the device.
    """
    if not fits(sample.batch):
        return False
    stock = builder.stock_metadata(sample.common)

    def lay_out() -> StockHeadSequences:
        sequences = StockHeadSequences(sample.batch, pages, stock, sample.common)
        assert sequences.by_layer
        return sequences

    def attend(batch: AttendingBatch) -> None:
        batch.attend(layer.impl, layer, sample.query, sample.output)

    ours = seconds(lambda: attend(sample.batch), clock)
    try:
        sequences = lay_out()
        num_layers = sample.batch.tables.num_layers
        theirs = seconds(lambda: attend(sequences), clock) + seconds(lay_out, clock) / num_layers
    except Exception as error:  # no error may stop the server: our kernel serves then
        logger.warning("vLLM's kernel cannot attend over head pages here: %s", error)
        return False
    logger.info(
        "Attention of a layer over %d compressed requests: our kernel %.0f us, vLLM's %.0f us.",
        len(sample.batch.tables.slots),
        1e6 * ours,
        1e6 * theirs,
    )
    return theirs < ours


def seconds(call: Callable[[], Any], clock: Clock) -> float:
    """Mean time of a call on the device; waits for it."""
    for _ in range(WARM_UPS):
        call()
    begin = clock.mark()
    for _ in range(RUNS):
        call()
    end = clock.mark()
    while not clock.passed(end):
        pass
    return clock.seconds(begin, end) / RUNS
