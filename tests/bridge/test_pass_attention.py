"""Attention of the passes that run beside vLLM's steps, and its scores, against plain torch."""

from types import SimpleNamespace

import pytest
import torch
from softmax_terms import weights_of

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.model import windowed_attention
from vllm_kvzip.planning.reconstruction import Chunk, scores_from_normaliser
from vllm_kvzip.vllm_bridge.passes.calibration_pass import (
    CaughtCache,
    ReadingMetadata,
    WindowReadingMetadata,
)
from vllm_kvzip.vllm_bridge.passes.last_token import last_token_metadata
from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatedContext, ScoringMetadata, Segment
from vllm_kvzip.vllm_bridge.passes.window_pass import WindowMetadata

pytestmark = pytest.mark.vllm

HEADS, GROUP, DIM, SINK_TOKENS = 2, 3, 16, 2
GEOMETRY = CacheGeometry(1, HEADS, GROUP, DIM, block_size=1)
LAYER = SimpleNamespace(layer_name="layer")
KERNEL = pytest.param(
    column_maximum,
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here"),
)
TERMS = pytest.mark.parametrize(
    ("soft_cap", "has_sinks"), [(0, False), (0.6, False), (0, True), (0.6, True)]
)


def implementation(soft_cap, has_sinks):
    """As much of vLLM's as passes look at."""
    sinks = torch.linspace(-1, 3, HEADS * GROUP).bfloat16() if has_sinks else None
    return SimpleNamespace(scale=0.3, logits_soft_cap=soft_cap, sinks=sinks)


def weights(queries, keys, impl, member, hidden):
    """Softmax weights ``[rows, K]`` of one query head."""
    logits = (queries @ keys.T * impl.scale).masked_fill(hidden, float("-inf"))
    sink = None if impl.sinks is None else float(impl.sinks[member])
    return weights_of(logits, impl.logits_soft_cap, sink)


@TERMS
def test_reading_is_causal_attention(soft_cap, has_sinks):
    torch.manual_seed(0)
    impl = implementation(soft_cap, has_sinks)
    query = torch.randn(7, HEADS * GROUP, DIM)
    key, value = torch.randn(2, 7, HEADS, DIM)
    output = torch.empty_like(query)
    cache = CaughtCache(GEOMETRY, {"layer": 0}, torch.device("cpu"))
    ReadingMetadata(cache).attend(LAYER, impl, query, key, value, output)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for member in range(HEADS * GROUP):
        head = member // GROUP
        wanted = weights(query[:, member], key[:, head], impl, member, future) @ value[:, head]
        torch.testing.assert_close(output[:, member], wanted)


@TERMS
@pytest.mark.parametrize("score_columns", [scores_from_normaliser, KERNEL])
def test_repeating_is_attention_over_first_tokens_chunk_and_itself(
    score_columns, soft_cap, has_sinks
):
    torch.manual_seed(1)
    impl = implementation(soft_cap, has_sinks)
    cache = CaughtCache(GEOMETRY, {"layer": 0}, torch.device("cpu"))
    keys, values = torch.randn(2, HEADS, 20, DIM)
    cache.layers[0] = keys, values
    chunk = Chunk(8, 17, list(range(11)))
    context = RepeatedContext(
        range(20), cache.page_ids(torch.arange(20)), torch.zeros(1, HEADS, 20), [chunk]
    )
    metadata = ScoringMetadata(
        [Segment(4, 15, context, chunk)], cache, {"layer": 0}, SINK_TOKENS, 1, score_columns
    )
    query = torch.randn(15, HEADS * GROUP, DIM)
    key, value = torch.randn(2, 15, HEADS, DIM)
    output = torch.empty_like(query)
    metadata.attend(LAYER, impl, query, key, value, output)
    seen = [*range(SINK_TOKENS), *range(chunk.start, chunk.end)]
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    hidden = torch.cat([torch.zeros(11, len(seen), dtype=torch.bool), future], dim=1)
    for head in range(HEADS):
        all_keys = torch.cat([keys[head, seen], key[4:, head]])
        all_values = torch.cat([values[head, seen], value[4:, head]])
        best = torch.zeros(chunk.end - chunk.start)
        for member in range(head * GROUP, (head + 1) * GROUP):
            of_member = weights(query[4:, member], all_keys, impl, member, hidden)
            torch.testing.assert_close(output[4:, member], of_member @ all_values)
            best = best.maximum(of_member[:, SINK_TOKENS : len(seen)].amax(0))
        scores = context.scores[0, head]
        torch.testing.assert_close(scores[chunk.start : chunk.end], best, rtol=1e-4, atol=1e-5)


@TERMS
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_is_kept_over_the_context_and_what_repeats_it(
    soft_cap, has_sinks, window, monkeypatch
):
    monkeypatch.setattr(windowed_attention, "ROWS_AT_ONCE", 4)
    torch.manual_seed(2)
    impl = implementation(soft_cap, has_sinks)
    cache = CaughtCache(GEOMETRY, {}, torch.device("cpu"), {"layer": window})
    read, repeated = 14, [slice(0, 9), slice(9, 12)]
    query = torch.randn(read + 12, HEADS * GROUP, DIM)
    key, value = torch.randn(2, read + 12, HEADS, DIM)
    output = torch.empty_like(query)
    parts = [part[:read] for part in (query, key, value, output)]
    WindowReadingMetadata(cache).attend(LAYER, impl, *parts)
    segments = [Segment(rows.start, rows.stop, None, None) for rows in repeated]
    parts = [part[read:] for part in (query, key, value, output)]
    WindowMetadata(segments, cache).attend(LAYER, impl, *parts)
    for rows in (slice(0, 0), *repeated):  # first the context alone, then what is read after it
        order = [*range(read), *range(read + rows.start, read + rows.stop)]
        own = slice(read if rows.stop else 0, None)
        distance = torch.arange(len(order))[:, None] - torch.arange(len(order))
        hidden = (distance < 0) | (distance >= window)
        for member in range(HEADS * GROUP):
            keys, values = key[order, member // GROUP], value[order, member // GROUP]
            wanted = weights(query[order, member], keys, impl, member, hidden) @ values
            torch.testing.assert_close(output[order, member][own], wanted[own])


@TERMS
def test_the_last_token_of_a_context_sees_what_it_sees_in_a_step(soft_cap, has_sinks):
    """All tokens before it in a full layer, the last ones in a layer with a window."""
    torch.manual_seed(3)
    impl, window, num_tokens = implementation(soft_cap, has_sinks), 6, 20
    cache = CaughtCache(GEOMETRY, {"layer": 0}, torch.device("cpu"), {"narrow": window})
    keys, values = torch.randn(2, HEADS, num_tokens, DIM)
    seen = slice(num_tokens - window, num_tokens - 1)
    cache.layers[0], cache.window_ends["narrow"] = (keys, values), (keys[:, seen], values[:, seen])
    pages = cache.page_ids(torch.arange(num_tokens))
    context = RepeatedContext(range(num_tokens), pages, torch.zeros(0), [])
    metadata, (found,) = last_token_metadata([context], cache, cache.layer_index, cache)
    query = torch.randn(1, HEADS * GROUP, DIM)
    key, value = torch.randn(2, 1, HEADS, DIM)
    for name, first in (("layer", 0), ("narrow", num_tokens - window)):
        output = torch.empty_like(query)
        metadata[name].attend(SimpleNamespace(layer_name=name), impl, query, key, value, output)
        for member in range(HEADS * GROUP):
            head = member // GROUP
            all_keys = torch.cat([keys[head, first:-1], key[:, head]])
            all_values = torch.cat([values[head, first:-1], value[:, head]])
            hidden = torch.zeros(1, len(all_keys), dtype=torch.bool)
            wanted = weights(query[:, member], all_keys, impl, member, hidden) @ all_values
            torch.testing.assert_close(output[:, member], wanted)
    assert list(found) == ["narrow"]
    assert torch.equal(found["narrow"][0], key.transpose(0, 1))
    assert torch.equal(found["narrow"][1], value.transpose(0, 1))
