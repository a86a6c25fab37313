"""Which KV heads a rank has, against the layer that deals them out in vLLM."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from vllm_kvzip.vllm_bridge.parallelism import can_share, first_kv_head

pytestmark = pytest.mark.vllm

HEAD_DIM = 2


def heads_that_vllm_loads(monkeypatch, rank, num_ranks, total):
    """Numbers of the KV heads whose weights a rank gets from a checkpoint."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    with set_current_vllm_config(VllmConfig()):
        layer = linear.QKVParallelLinear(1, HEAD_DIM, 24, total, bias=False)
    checkpoint = torch.arange(total).repeat_interleave(HEAD_DIM)[:, None].float()
    layer.weight_loader(layer.weight, checkpoint, "k")
    loaded = layer.weight[layer.num_heads * HEAD_DIM :][: layer.num_kv_heads * HEAD_DIM]
    return loaded.flatten().tolist()[::HEAD_DIM]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 8, 12, 24])
def test_ranks_have_the_heads_that_vllm_gives_them(monkeypatch, num_ranks, total):
    if not can_share(num_ranks, total):
        with pytest.raises(AssertionError, match="is not divisible"):
            heads_that_vllm_loads(monkeypatch, 0, num_ranks, total)
        return
    for rank in range(num_ranks):
        wanted = heads_that_vllm_loads(monkeypatch, rank, num_ranks, total)
        first = first_kv_head(rank, num_ranks, total)
        assert list(range(first, first + max(1, total // num_ranks))) == wanted
