"""What attention over quantized pages costs on the CPU, beside vLLM's kernel over ordinary ones.

    python scripts/benchmark_quantized.py

One layer, one decode step of requests that all keep their whole context: in ordinary pages by
vLLM's CPU kernel, and in quantized pages as the plugin attends to them. Beside that the other way:
what it takes to make ordinary scratch pages of the quantized ones, over which vLLM's kernel would
go then. They take turns; medians.
"""

from __future__ import annotations

import argparse
import functools
import time
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.evaluation.engines import versions
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.quantization import Quantization, choose_quantization
from vllm_kvzip.quantization.reading import PageReader
from vllm_kvzip.storage.page_store import PackedPages
from vllm_kvzip.storage.tiered_attention import TieredAttention, TierPages
from vllm_kvzip.vllm_bridge.attention.head_sequence_batches import HeadSequenceBatch
from vllm_kvzip.vllm_bridge.cache.cpu_pages import discover_codec

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 32
FORMATS = ("nf4", "int4", "int8")
AT_ONCE = 64  # quantized pages


def ordinary(args: argparse.Namespace, geometry: CacheGeometry) -> HeadSequenceBatch:
    """Pairs whose pages hold everything as it is."""
    num_sequences = args.requests * geometry.num_kv_heads
    width = args.context_tokens // BLOCK
    shape = (num_sequences * width, 1, 2 * BLOCK, geometry.head_dim)
    halves = torch.randn(shape, dtype=torch.bfloat16).chunk(2, dim=2)
    return HeadSequenceBatch(
        pages=(halves[0], halves[1]),
        tables=torch.arange(num_sequences * width, dtype=torch.int32).view(1, num_sequences, width),
        seq_lens=torch.full((1, num_sequences), args.context_tokens, dtype=torch.int32),
        query_start_loc=torch.arange(num_sequences + 1, dtype=torch.int32),
        sequence_rows=None,
        num_kv_heads=geometry.num_kv_heads,
        group_size=geometry.group_size,
        head_dim=geometry.head_dim,
        layer_index={"layer": 0},
        isa=_get_attn_isa(torch.bfloat16, BLOCK, geometry.head_dim),
    )


def scratch_store(geometry: CacheGeometry) -> PackedPages:
    """Ordinary pages for the tokens of some quantized ones, as vLLM's kernel stores them."""
    isa = _get_attn_isa(torch.bfloat16, BLOCK, geometry.head_dim)
    codec = discover_codec(BLOCK, geometry.head_dim, torch.bfloat16, isa)
    pages = torch.empty(AT_ONCE * 8, 2 * BLOCK * geometry.head_dim, dtype=torch.bfloat16)
    return PackedPages(pages, codec, BLOCK, geometry.head_dim)


def write_scratch(
    chosen: Quantization,
    reader: PageReader,
    pages: torch.Tensor,
    ids: torch.Tensor,
    store: PackedPages,
) -> None:
    """Quantized pages as ordinary ones, the same scratch pages again and again."""
    for part in ids.split(AT_ONCE):
        rows = []
        read = reader.read(pages.index_select(0, part))
        for half, order in zip(read, (reader.key_order, reader.value_order), strict=True):
            tokens = torch.empty_like(half)
            tokens[..., order] = half
            rows.append(chosen.turn_back(tokens).flatten(0, 1).bfloat16())
        num_pages = len(rows[0]) // BLOCK
        whole = [half[: num_pages * BLOCK] for half in rows]
        store.write(torch.arange(num_pages), *whole)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--context-tokens", type=int, default=3840)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    geometry = CacheGeometry(1, args.kv_heads, args.group_size, args.head_dim, BLOCK)
    num_sequences = args.requests * args.kv_heads
    query = torch.randn(args.requests, args.kv_heads * args.group_size, args.head_dim)
    batch = ordinary(args, geometry)
    impl: Any = SimpleNamespace(scale=args.head_dim**-0.5, logits_soft_cap=0, sinks=None)
    layer = SimpleNamespace(layer_name="layer")
    stock_query = query.bfloat16()
    empty = TierPages(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    calls: dict[str, Callable[[], Any]] = {
        "stock": lambda: batch.attend(impl, layer, stock_query, torch.empty_like(stock_query))
    }
    for name in FORMATS:
        chosen = choose_quantization(
            page_bytes=4 * BLOCK * args.head_dim, head_dim=args.head_dim, keys=name, values=name,
            rotation="auto",
        )  # fmt: skip
        tokens = chosen.layout.page_tokens
        count = -(-args.context_tokens // tokens)
        some = torch.randn(2, 64, tokens, args.head_dim)
        pages = chosen.pack(some[0], some[1]).repeat(-(-num_sequences * count // 64), 1)
        reader = PageReader(chosen.layout)
        attention = TieredAttention(
            reader=reader,
            rotated=chosen.rotated,
            read_quantized=functools.partial(pages.index_select, 0),
            read_full=lambda ids: (torch.zeros(0), torch.zeros(0)),
            scale=impl.scale,
        )
        owners = torch.arange(num_sequences).repeat_interleave(count)
        tier = TierPages(
            torch.arange(num_sequences * count),
            owners,
            torch.arange(count).repeat(num_sequences) * tokens,
        )
        held = torch.full((num_sequences,), args.context_tokens)
        rows = query.view(num_sequences, args.group_size, args.head_dim)
        seen = torch.zeros(num_sequences, args.group_size, dtype=torch.int64)
        keys = KeyTransform.fit(torch.randn(num_sequences, tokens, args.head_dim))
        calls[name] = functools.partial(attention.attend_rows, rows, tier, held, keys, empty, seen)
        calls[f"{name}, scratch pages alone"] = functools.partial(
            write_scratch, chosen, reader, pages, tier.ids, scratch_store(geometry)
        )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    stock = median(seconds["stock"][1:])
    table = Table("", "ms", "of stock", title="One layer, one decode step")
    for name, values in seconds.items():
        found = median(values[1:])
        table.add_row(name, f"{1e3 * found:.1f}", f"{found / stock:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{args.requests} requests of {args.context_tokens} tokens, {args.kv_heads} KV heads, "
        f"groups of {args.group_size}, head size {args.head_dim}, bfloat16; {versions()}"
    )


if __name__ == "__main__":
    main()
