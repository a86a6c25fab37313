"""Requests with prefixes of two tiers in a small cache, and what their queries must attend to."""

from types import SimpleNamespace

import torch
from softmax_terms import weights_of
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization, rotate_back, unpack_pages
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import PagePool, fold_row
from vllm_kvzip.storage.tiered_attention import quantized_tokens
from vllm_kvzip.vllm_bridge.attention.batches import PrefixState
from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache

LAYERS, HEADS, GROUP, DIM, BLOCK = 2, 2, 3, 32, 32
GEOMETRY = CacheGeometry(LAYERS, HEADS, GROUP, DIM, BLOCK)
NUM_BLOCKS = 160
POOL = PagePool(num_blocks=NUM_BLOCKS, num_layers=LAYERS, num_kv_heads=HEADS)
IMPL = SimpleNamespace(scale=0.3, logits_soft_cap=0, sinks=None)
NAMES = {"first": 0, "second": 1}


class TieredWorld:
    """A cache whose free pages hold NaN.

    Args:
        make_store: pages and quantization to a page store.
        mode, ratio: of compression.
        rotation: see :class:`~vllm_kvzip.config.KVzipConfig`.
        formats: of keys and of values.
        width: columns of a block table.
    """

    def __init__(self, make_store, mode="mixed", ratio=0.4, rotation="auto", width=24,
                 formats=("nf4", "int8")):  # fmt: skip
        self.quantization = choose_quantization(
            page_bytes=2 * BLOCK * DIM * 4, head_dim=DIM, keys=formats[0], values=formats[1],
            rotation=rotation,
        )  # fmt: skip
        self.pages = torch.full((NUM_BLOCKS * LAYERS * HEADS, 2 * BLOCK * DIM), float("nan"))
        self.store = make_store(self.pages, self.quantization)
        self.cache = HeadPageCache(
            GEOMETRY, POOL, self.pages, self.store, NAMES, self.quantization, num_first=2
        )
        tiers = TierRule(
            mode, BLOCK, self.quantization.layout.page_tokens, full_share=0.6,
            split=self.quantization.split,
        )  # fmt: skip
        self.rule = PrefixRule(ratio, 0, 2, 2, BLOCK, tiers=tiers)
        self.press = Compressor(
            geometry=GEOMETRY, pool=POOL, store=self.store, rule=self.rule,
            scorer=create_scorer("knorm"), budget="adaptive",
        )  # fmt: skip
        self.free = torch.randperm(NUM_BLOCKS - 1).add(1).tolist()
        self.width = width
        self.rows, self.states, self.lengths = {}, {}, {}
        self.held = {}  # request -> [layer][head] -> keys and values of the prefix

    def write(self, blocks, keys, values):
        """Keys and values ``[L, H, n * N, D]`` into whole blocks."""
        ids = POOL.page_ids(torch.tensor(blocks))
        for layer in range(LAYERS):
            flat = ids[layer].flatten()
            own = keys[layer].reshape(-1, DIM), values[layer].reshape(-1, DIM)
            if hasattr(self.store, "write"):
                self.store.write(flat, *own)
            else:
                for view, half in zip(self.store.views(), own, strict=True):
                    view[flat] = half.view(-1, BLOCK, DIM)

    def add(self, name, prompt, length, compressed=True):
        """A request of ``length`` tokens, whose first ``prompt`` ones were its prompt."""
        blocks = [self.free.pop() for _ in range(-(-length // BLOCK))]
        keys, values = torch.randn(2, LAYERS, HEADS, len(blocks) * BLOCK, DIM)
        keys[:, :, length:] = values[:, :, length:] = float("nan")
        keys[:, :, :, 3] *= 16.0  # an outlier channel, and a constant
        keys[:, :, :, 5] += 50.0
        self.write(blocks, keys, values)
        self.lengths[name] = length
        boundary, prefix = 0, [[(keys[0, 0, :0], values[0, 0, :0])] * HEADS] * LAYERS
        if compressed:
            plan = self.rule.plan(prompt)
            reserve = [self.free.pop() for _ in range(plan.num_compressed_blocks)]
            state, _ = self.press.compress(
                source_blocks=blocks[: plan.num_prefix_blocks], target_blocks=reserve, plan=plan,
                observation_queries=None, scale=1.0, seed=0,
            )  # fmt: skip
            self.states[name] = PrefixState(state, plan)
            blocks = fold_row(blocks + reserve, plan, len(blocks), 0)
            boundary = plan.boundary_tokens
            prefix = self.read_prefix(state, plan) if plan.num_quantized_blocks else None
        self.rows[name] = blocks + [0] * (self.width - len(blocks))
        tail = keys[:, :, boundary:length], values[:, :, boundary:length]
        if prefix is None:  # nothing was quantized, and all was kept
            boundary, prefix = 0, [[(keys[0, 0, :0], values[0, 0, :0])] * HEADS] * LAYERS
            tail = keys[:, :, :length], values[:, :, :length]
        self.held[name] = [
            [
                tuple(
                    torch.cat([kept, half[layer, head]])
                    for kept, half in zip(prefix[layer][head], tail, strict=True)
                )
                for head in range(HEADS)
            ]
            for layer in range(LAYERS)
        ]

    def read_prefix(self, prefix, plan):
        """Keys and values of each head as they are kept, in both tiers."""
        page_tokens = self.quantization.layout.page_tokens
        counts = quantized_tokens(prefix, plan.boundary_tokens, BLOCK, page_tokens)
        first = len(prefix.page_ids) * self.quantization.split
        found = []
        for pair in range(LAYERS * HEADS):
            layer, head = divmod(pair, HEADS)
            full = prefix.page_ids[prefix.offsets[pair] : prefix.offsets[pair + 1]]
            begin, end = (prefix.offsets_of(1)[pair : pair + 2] - first).tolist()
            ids = prefix.quantized.page_ids[begin:end]
            store = self.store
            kept = store.read_keys(full[None], layer)[0], store.read_values(full[None], layer)[0]
            if count := int(counts[layer, head]):
                halves = unpack_pages(
                    self.quantization.pages_of(self.pages)[ids], self.quantization.layout
                )
                halves = [half[:count] for half in halves]
                if self.quantization.rotated:
                    halves = [rotate_back(half) for half in halves]
                halves[0] = prefix.key_transform.at(layer).at(head).undo(halves[0])
                kept = tuple(torch.cat(both) for both in zip(kept, halves, strict=True))
            found.append(kept)
        return [found[first : first + HEADS] for first in range(0, len(found), HEADS)]

    def step(self, names, query_lens):
        """vLLM's metadata of a batch, and queries."""
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        seq_lens = torch.tensor([self.lengths[name] for name in names]).int()
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=seq_lens,
            num_reqs=len(names), num_actual_tokens=int(starts[-1]),
            max_query_len=max(query_lens), max_seq_len=int(seq_lens.max()),
            block_table_tensor=torch.tensor([self.rows[name] for name in names]).int(),
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        )  # fmt: skip
        return common, torch.randn(int(starts[-1]), HEADS * GROUP, DIM)

    def expected(self, names, query_lens, query, layer, impl=IMPL):
        """Attention pair by pair, of every request."""
        output = torch.empty_like(query)
        start = 0
        for name, count in zip(names, query_lens, strict=True):
            for head in range(HEADS):
                keys, values = self.held[name][layer][head]
                last = len(keys) - count + torch.arange(count)
                hidden = torch.arange(len(keys)) > last[:, None]
                for member in range(head * GROUP, (head + 1) * GROUP):
                    logits = query[start : start + count, member] @ keys.T * impl.scale
                    logits = logits.masked_fill(hidden, float("-inf"))
                    sink = None if impl.sinks is None else impl.sinks[member]
                    weights = weights_of(logits, impl.logits_soft_cap, sink)
                    output[start : start + count, member] = weights @ values
            start += count
        return output
