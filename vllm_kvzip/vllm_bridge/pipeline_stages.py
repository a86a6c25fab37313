"""What pipeline stages tell each other beside vLLM's hidden states.

Figures of a step go the way of the hidden states: each stage takes what the stage before it found,
adds its own, and hands the sum on. Only the last stage's output reaches the scheduler, so nobody
else needs the sum, and no stage waits for a later one. vLLM's own calls carry it, in one order with
the hidden states: every stage must hand on figures in the same steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.symbols import get_pp_group

if TYPE_CHECKING:
    import torch

_FIGURES = "kvzip_figures"


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
