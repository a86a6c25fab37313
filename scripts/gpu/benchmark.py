"""How fast the kernels are on a card, beside what everybody has there.

Decode over head pages is timed against the fastest stock kernel on the same full cache: vLLM's
FlashAttention or torch's scaled dot-product attention, and FlexAttention where vLLM is missing.
Compaction is timed against a device-to-device copy of as many bytes, scores against the matrix
product they contain. Each is captured in a CUDA graph, as vLLM decodes; times are medians of
``triton.testing.do_bench`` over its replays, with an empty L2 cache before each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from gpu.checks import compaction_inputs
from gpu.kernel_cases import Asked, Case, Shape, make_case
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.kernels.head_page_attention import head_page_attention
from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.quantization import Int8, NormalFloat4

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvzip.kernels.page_tables import PageTables
    from vllm_kvzip.quantization import Format

KEEP_RATIOS = (1.0, 0.5, 0.25, 0.125)
MOST_BYTES = 40 * 2**30
"""Larger caches are left out."""


@dataclass(frozen=True)
class Load:
    """One decode step: requests, tokens of context each, query heads per KV head."""

    batch: int
    context: int
    group: int
    num_kv_heads: int = 8
    head_dim: int = 128
    page_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def cache_bytes(self) -> int:
        """Of one layer, uncompressed."""
        tokens = self.batch * self.context * self.num_kv_heads
        return 2 * tokens * self.head_dim * self.dtype.itemsize

    def case(self, keep_ratio: float, device: str) -> Case:
        """A batch whose prompts are compressed unevenly, with half a page of new tokens each."""
        tail = self.page_tokens // 2
        blocks = self.context // self.page_tokens
        asked = Asked(self.context + tail, 1, blocks, keep_ratio)
        return make_case([asked] * self.batch, self.shape, dtype=self.dtype, device=device)

    @property
    def shape(self) -> Shape:
        """Of one layer."""
        return Shape(1, self.num_kv_heads, self.group, self.head_dim, self.page_tokens)

    def quantized_case(self, page_format: Format, device: str) -> Case:
        """The same batch with everything quantized, but for pages that heads leave to others."""
        layout = self.shape.page_layout(self.dtype, page_format, page_format)
        blocks = self.context // self.page_tokens
        share = self.page_tokens / layout.page_tokens
        asked = Asked(self.context + self.page_tokens // 2, 1, blocks, None, share)
        return make_case(
            [asked] * self.batch, self.shape, dtype=self.dtype, device=device, layout=layout,
            rotated=True,
        )  # fmt: skip


LOADS = [
    *(
        Load(batch, context, 4)
        for batch, context in (
            (1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (8, 131072),
            (32, 4096), (32, 32768), (256, 4096), (256, 16384),
        )
    ),
    *(Load(batch, context, 8) for batch, context in ((1, 4096), (8, 32768), (32, 32768))),
]  # fmt: skip
TUNED = [(Load(1, 32768, 4), 1.0), (Load(8, 4096, 4), 0.5), (Load(32, 32768, 4), 0.25)]
SMALL_LOADS = [Load(2, 256, 4, 2, 64), Load(1, 512, 8, 1, 128)]


def seconds(call: Callable[[], Any], device: str, *, in_graph: bool = True) -> float:
    """Median time of one call; of a replay of its CUDA graph on a card."""
    if device == "cpu":  # a dry run
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    if not in_graph:
        return median_seconds(call)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and fills what is allocated once
        for _ in range(2):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_seconds(graph.replay)


def median_seconds(call: Callable[[], Any]) -> float:
    """By a card's own clock."""
    return float(triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median")) / 1e3


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes read plus bytes written, per second, of a device-to-device copy.

    Not in a graph, where a copy is a slower node of its own kind.
    """
    source = torch.empty(num_bytes // 2, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device, in_graph=False)


def head_pages(case: Case, **how: Any) -> Callable[[], Any]:
    """Our kernel."""
    longest = int(case.tables.seq_lens.max())
    output = torch.empty_like(case.query)
    return lambda: head_page_attention(
        case.query, case.key_pages, case.value_pages, case.query_start_loc, case.tables, 0,
        case.scale, max_query_len=1, max_tokens=longest, output=output, **how,
    )  # fmt: skip


def vllm_flash_attention() -> Callable[..., Any] | None:
    """vLLM's FlashAttention on paged caches; None without vLLM."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    attend: Callable[..., Any] = flash_attn_varlen_func
    return attend


def flash_over_head_pages(case: Case) -> Callable[[], Any] | None:
    """vLLM's FlashAttention with a (request, KV head) pair as sequence; None without it."""
    flash_attention = vllm_flash_attention()
    if flash_attention is None:
        return None
    tables: PageTables = case.tables
    num_pairs = len(tables.slots) * tables.num_kv_heads
    longest = int(tables.seq_lens.max())
    width = -(-longest // tables.page_tokens) + 1
    device = case.query.device
    flat = torch.zeros(1, num_pairs, width, dtype=torch.int32, device=device)
    lengths = torch.zeros(1, num_pairs, dtype=torch.int32, device=device)
    flatten_tables(tables, flat, lengths)
    starts = torch.arange(num_pairs + 1, dtype=torch.int32, device=device)
    query = case.query.reshape(num_pairs, -1, case.query.shape[2])
    keys, values = case.key_pages[:, :, None], case.value_pages[:, :, None]
    return lambda: flash_attention(
        q=query, k=keys, v=values, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest,
        seqused_k=lengths[0], softmax_scale=case.scale, causal=True, block_table=flat[0],
        fa_version=3,
    )  # fmt: skip


def stock_kernels(load: Load, device: str) -> dict[str, Callable[[], Any]]:
    """Decode attention over the same uncompressed cache, by name."""
    random = torch.Generator(device).manual_seed(1)
    shape = (load.batch, load.num_kv_heads, load.context, load.head_dim)
    num_query_heads = load.num_kv_heads * load.group

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=load.dtype, device=device, generator=random)

    query = new(load.batch, num_query_heads, 1, load.head_dim)
    keys, values = new(*shape), new(*shape)
    attend = torch.nn.functional.scaled_dot_product_attention
    kernels: dict[str, Callable[[], Any]] = {
        "SDPA": lambda: attend(query, keys, values, enable_gqa=True)
    }
    if device == "cpu":
        return kernels
    if (flash_attention := vllm_flash_attention()) is None:  # which is faster than this one
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = 2 * len(LOADS)
        flex = torch.compile(flex_attention, dynamic=False)
        kernels["FlexAttention"] = lambda: flex(query, keys, values, enable_gqa=True)
        return kernels
    blocks = load.context // load.page_tokens
    paged = [
        half.transpose(1, 2).reshape(-1, load.page_tokens, load.num_kv_heads, load.head_dim)
        for half in (keys, values)
    ]
    table = torch.arange(load.batch * blocks, dtype=torch.int32, device=device)
    table = table.view(load.batch, blocks)
    starts = torch.arange(load.batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((load.batch,), load.context, dtype=torch.int32, device=device)
    rows = query[:, :, 0]
    kernels["FlashAttention"] = lambda: flash_attention(
        q=rows, k=paged[0], v=paged[1], max_seqlen_q=1, cu_seqlens_q=starts,
        max_seqlen_k=load.context, seqused_k=lengths, causal=True, block_table=table, fa_version=3,
    )  # fmt: skip
    return kernels


def stock_seconds(load: Load, device: str) -> dict[str, float]:
    """Of every stock kernel that runs here; what does not run is left out."""
    found = {}
    for name, kernel in stock_kernels(load, device).items():
        try:
            found[name] = seconds(kernel, device)
        except Exception as error:  # an optional kernel that this torch lacks for this shape
            print(f"{name} does not run: {str(error).splitlines()[0][:120]}", flush=True)
    return found


def decode_rows(loads: list[Load], device: str, bandwidth: float) -> list[dict[str, Any]]:
    """One row per load and keep ratio."""
    rows = []
    for load in loads:
        if load.cache_bytes > MOST_BYTES:
            continue
        stock = stock_seconds(load, device)
        name, best = min(stock.items(), key=lambda item: item[1])
        if device != "cpu":
            torch.cuda.empty_cache()
        for ratio in KEEP_RATIOS:
            case = load.case(ratio, device)
            taken = seconds(head_pages(case), device)
            flash = flash_over_head_pages(case) if device != "cpu" else None
            rows.append(
                {
                    "batch": load.batch,
                    "context": load.context,
                    "group": load.group,
                    "keep": ratio,
                    "stock": name,
                    "stock_us": 1e6 * best,
                    "ours_us": 1e6 * taken,
                    "ratio": taken / best,
                    "bandwidth_share": ratio * load.cache_bytes / taken / bandwidth,
                    "flash_us": 1e6 * seconds(flash, device) if flash else None,
                }
            )
            del case, flash
        told = ", ".join(f"{row['ours_us']:.0f}" for row in rows[-len(KEEP_RATIOS) :])
        print(f"{load.batch} x {load.context}, GQA {load.group}: {name} {1e6 * best:.0f} us, "
              f"ours {told} us", flush=True)  # fmt: skip
    return rows


def quantized_rows(loads: list[Load], device: str) -> list[dict[str, Any]]:
    """Decode over quantized pages that hold as many tokens on average, over ordinary ones."""
    formats = {"nf4": NormalFloat4(32, double_quantization=True), "int8": Int8()}
    rows = []
    for load in loads:
        if load.cache_bytes > MOST_BYTES:
            continue
        ordinary = seconds(head_pages(load.case(1.0, device)), device)
        for name, page_format in formats.items():
            case = load.quantized_case(page_format, device)
            taken = seconds(head_pages(case, quantized=case.quantized), device)
            rows.append(
                {
                    "batch": load.batch,
                    "context": load.context,
                    "group": load.group,
                    "format": name,
                    "us": 1e6 * taken,
                    "of_ordinary": taken / ordinary,
                }
            )
            del case
    return rows


def compaction_row(device: str, bandwidth: float, *, small: bool) -> dict[str, Any]:
    """One prompt of 32,768 tokens, 32 layers of 8 KV heads of size 128, a quarter kept."""
    shape = Shape(2, 2, 1, 64, 16) if small else Shape(32, 8, 1, 128, 16)
    blocks = 8 if small else 2048
    pages, *rest = compaction_inputs(shape, blocks, 0.25, torch.bfloat16, device)
    keys, values = pages.split(shape.head_dim, dim=-1)
    taken = seconds(lambda: compact_pages(keys, values, *rest), device)
    moved = 2 * len(rest[3]) * pages[0].numel() * pages.element_size()
    return {"ms": 1e3 * taken, "bandwidth_share": moved / taken / bandwidth}


def score_row(device: str, *, small: bool) -> dict[str, Any]:
    """One chunk of 2,048 keys of 8 KV heads, 4 query heads each; a product of the same size."""
    tokens = 64 if small else 2048
    random = torch.Generator(device).manual_seed(2)

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=device, generator=random)

    queries, keys = new(8, 4 * tokens, 128), new(8, tokens, 128)
    log_normaliser = torch.full((8, 4 * tokens), 8.0, device=device)
    taken = seconds(lambda: column_maximum(queries, keys, log_normaliser, 0.09), device)
    transposed = keys.transpose(1, 2)
    product = seconds(lambda: torch.bmm(queries, transposed), device)
    flops = 2 * 8 * 4 * tokens * tokens * 128
    return {"ms": 1e3 * taken, "tflops": flops / taken / 1e12, "of_product": taken / product}


def tuning_rows(load: Load, keep_ratio: float, device: str) -> list[dict[str, Any]]:
    """Every way of cutting the work that is worth a try, fastest first; the plugin's has none.

    A way is compiled once for all loads of a head size.
    """
    case = load.case(keep_ratio, device)
    about = {"batch": load.batch, "context": load.context, "keep": keep_ratio}
    rows = [{**about, "us": 1e6 * seconds(head_pages(case), device)}]
    for tokens, warps, stages in product((64, 128), (4, 8), (2, 3, 4)):
        for runs in (4, 8, 16, 32):
            how = {"tokens": tokens, "num_warps": warps, "num_stages": stages, "num_runs": runs}
            try:
                taken = seconds(head_pages(case, **how), device)
            except OutOfResources:  # too much shared memory
                break
            rows.append({**about, **how, "us": 1e6 * taken})
    return sorted(rows, key=lambda row: row["us"])
