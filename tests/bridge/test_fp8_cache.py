"""Scales and queries of vLLM's 8-bit cache, as its own attention layers hold them."""

import pytest
import torch
from vllm.model_executor.layers.attention import attention
from vllm.platforms import current_platform

from vllm_kvzip.storage.stored_scales import KEYS, QUERIES, VALUES
from vllm_kvzip.vllm_bridge.fp8_cache import queries_of_model, read_scales

pytestmark = pytest.mark.vllm


class Layer(torch.nn.Module):
    """What :func:`read_scales` sees of vLLM's layer, filled by vLLM's own function."""

    num_kv_heads = 2

    def __init__(self, cache_dtype, query_quant=None):
        super().__init__()
        self.kv_cache_dtype, self.query_quant = cache_dtype, query_quant
        attention.set_default_quant_scales(self, register_buffer=True)


def test_other_caches_have_none():
    assert read_scales([Layer("auto")], 2, torch.bfloat16) is None


@pytest.mark.parametrize("quantized_queries", [False, True])
def test_one_scale_or_one_for_each_head(quantized_queries):
    first, second = (Layer("fp8", quantized_queries or None) for _ in range(2))
    first._q_scale.fill_(3.0)
    first._k_scale.fill_(0.5)
    second._v_scale = torch.tensor([0.25, 0.125])
    scales = read_scales([first, second], 2, torch.bfloat16)
    queries = 3.0 if quantized_queries else 1.0
    assert scales.factors[QUERIES].tolist() == [[queries] * 2, [1.0, 1.0]]
    assert scales.factors[KEYS].tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert scales.factors[VALUES].tolist() == [[1.0, 1.0], [0.25, 0.125]]
    assert scales.stored is current_platform.fp8_dtype()
    assert scales.query_dtype is (scales.stored if quantized_queries else torch.bfloat16)


def test_queries_become_numbers_of_the_model():
    layer = Layer("fp8")
    query = torch.randn(5, 6, 8)
    assert queries_of_model(layer, query, torch.float32) is query
    stored = query.to(torch.float8_e4m3fn)
    layer._q_scale.fill_(2.0)
    assert torch.equal(queries_of_model(layer, stored, torch.float32), stored.float() * 2)
    layer._q_scale = torch.tensor([2.0, 3.0])
    by_head = torch.tensor([2.0, 2, 2, 3, 3, 3])[:, None]
    assert torch.equal(queries_of_model(layer, stored, torch.float32), stored.float() * by_head)
