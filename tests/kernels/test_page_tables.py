"""The kernels' rule for where a prefix's pages lie is the one that compaction follows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.kernels.page_tables import PagePlace, PageTables
from vllm_kvzip.kernels.reference import pages_of
from vllm_kvzip.storage.head_pages import PagePool, deal_pages


@given(
    num_layers=st.integers(1, 4),
    num_heads=st.integers(1, 4),
    per_head=st.sampled_from([1, 1, 2, 3]),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_dealt_pages_are_where_kernels_look(num_layers, num_heads, per_head, gaps, seed):
    random = torch.Generator().manual_seed(seed)
    block_stride = num_heads * per_head + gaps[0]
    pool = PagePool(
        50, num_layers, num_heads, first_page=gaps[2],
        layer_stride=50 * block_stride + gaps[1], block_stride=block_stride,
        pages_per_head=per_head,
    )  # fmt: skip
    pages = torch.randint(0, 9, (num_layers, num_heads), generator=random)
    num_blocks = -(-int(pages.sum()) // (num_layers * num_heads * per_head))
    blocks = torch.randperm(50, generator=random)[: num_blocks + 3]
    dealt = deal_pages(blocks[:num_blocks], int(pages.sum()), pool)
    boundary = num_blocks + 4
    row = torch.zeros(boundary + 3, dtype=torch.int32)
    row[:num_blocks] = blocks[:num_blocks]
    row[boundary:] = blocks[num_blocks:]
    offsets = torch.zeros(1, pages.numel() + 1, dtype=torch.int32)
    offsets[0, 1:] = pages.flatten().cumsum(0)
    tables = PageTables(
        offsets=offsets,
        boundary_pages=torch.tensor([boundary * per_head]),
        slots=torch.tensor([0]),
        block_table=row[None],
        seq_lens=torch.tensor([((boundary + 3) * per_head - 1) * 16 + 5]),
        place=PagePlace(*pool.strides, pool.first_page, per_head),
        num_kv_heads=num_heads,
        page_tokens=16,
    )
    found = []
    for layer in range(num_layers):
        for head in range(num_heads):
            ids, num_tokens = pages_of(tables, layer, 0, head)
            kept = int(pages[layer, head])
            assert num_tokens == kept * 16 + (3 * per_head - 1) * 16 + 5
            first = [pool.page_id(layer, int(block), head) for block in blocks[num_blocks:]]
            tail = [page + part for page in first for part in range(per_head)]
            assert ids[kept:].tolist() == tail
            found.append(ids[:kept])
    assert torch.equal(torch.cat(found), dealt)
