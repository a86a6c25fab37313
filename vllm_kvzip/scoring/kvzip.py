"""KVzip: the attention a KV pair gets while the model repeats its context (arXiv 2505.23416)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class KVzipScorer(Scorer):
    """The most attention any query of the group pays to the pair, section 3.2 of the paper.

    The engine runs the model once more over the context for it (``planning/reconstruction.py``),
    which costs about as much as the prefill and depends on nothing but the context.
    """

    name: ClassVar[str] = "kvzip"
    default_budget: ClassVar[Budget | None] = "adaptive"
    needs_reconstruction: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the model did not repeat the context."""
        if inputs.reconstruction is None:
            raise ValueError("Scorer 'kvzip' needs the attention of a repeated context.")
        return inputs.reconstruction
