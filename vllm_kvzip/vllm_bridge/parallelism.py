"""How workers share a model: the KV heads of ranks, and what pipeline stages tell each other.

Figures of a step go the way of vLLM's hidden states: each pipeline stage takes what the stage
before it found, adds its own, and hands the sum on. Only the last stage's output reaches the
scheduler, so nobody else needs the sum, and no stage waits for a later one. vLLM's own calls carry
it, in one order with the hidden states: every stage must hand on figures in the same steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.symbols import get_pp_group

if TYPE_CHECKING:
    import torch

_FIGURES = "kvzip_figures"


def first_kv_head(rank: int, num_ranks: int, total_num_kv_heads: int) -> int:
    """The first KV head of a rank.

    vLLM deals them out in order. Where there are more ranks than KV heads, each head lies on as
    many ranks that follow each other, with a part of its query heads on each.

    Args:
        rank: of ``num_ranks``.
        num_ranks: tensor-parallel size; it divides the number of KV heads or is a multiple of it.
        total_num_kv_heads: of the model.
    """
    return rank * total_num_kv_heads // num_ranks


def can_share(num_ranks: int, total_num_kv_heads: int) -> bool:
    """Whether vLLM can deal KV heads out to so many ranks."""
    few, many = sorted((num_ranks, total_num_kv_heads))
    return few == 0 or many % few == 0  # models without attention have no heads


def add_up_over_stages(own: torch.Tensor) -> torch.Tensor | None:
    """The sum over this stage and those before it.

    Args:
        own: figures of this stage; as many in every stage.

    Returns:
        on the last stage the sum over all stages, on the others None.
    """
    group = get_pp_group()
    if group.world_size == 1:
        return own
    if not group.is_first_rank:
        tensors, handles, postprocess = group.irecv_tensor_dict()
        for handle in handles:
            handle.wait()
        for finish in postprocess:
            finish()
        assert tensors is not None
        own = own + tensors[_FIGURES]
    if group.is_last_rank:
        return own
    group.isend_tensor_dict({_FIGURES: own})  # keeps the tensor until it has been sent
    return None
