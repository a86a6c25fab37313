"""What a scorer sees of one layer. Letters as in ``core.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.model.rotary import unrotated

if TYPE_CHECKING:
    from vllm_kvzip.model.rotary import RotaryTables


@dataclass(frozen=True)
class LayerInputs:
    """What a scorer sees of one layer.

    Attributes:
        layer, num_layers: which layer of how many, among all that are compressed in the model.
        keys: float32 ``[H, T, D]``, keys of the prefix after rotary embedding, T = boundary.
        values: float32 ``[H, T, D]``; None unless the scorer asks for them.
        observation_queries: float32 ``[W, H, G, D]``, queries of the last W context tokens after
            rotary embedding, the last of them at position ``num_context_tokens - 1``; None unless
            the scorer asks for them. W may be smaller than the setting when vLLM took the start of
            the window from its prefix cache.
        reconstruction: float32 ``[H, T]``, the most attention each pair got while the model
            repeated the prefix (``planning/reconstruction.py``); None unless the scorer asks.
        rotary: the model's rotary angles; None unless the scorer asks for them, or when the model
            has none.
        num_context_tokens: tokens a scorer may look at: the whole prompt, or T when the request
            declares a context that other questions shall reuse.
        scale: softmax scale.
        sink_tokens, recent_tokens: how many tokens at either end of the prefix are always kept.
        seed: equal for equal prefixes.
        first_position: position of the first key; not 0 when what lies before it was compressed
            earlier. T counts from there.
        keep_ratio: share of the KV pairs that will be kept, in (0, 1].
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; None or 0: they stay.
        sink_logits: float32 ``[H, G]``, a learned logit of each query head that joins its softmax
            and has no value; None: there is none.
        positions: int ``[H, T]``, position of each pair where they do not follow one another: what
            earlier rounds kept is scored anew with what is new. None: they do.
        real: bool ``[H, T]``, which of them are pairs. Heads keep different numbers, so pads stand
            between a head's kept pairs and its new ones; their keys and values are zero, and their
            scores are not looked at. None: all are.
    """

    layer: int
    num_layers: int
    keys: torch.Tensor
    values: torch.Tensor | None
    observation_queries: torch.Tensor | None
    reconstruction: torch.Tensor | None
    rotary: RotaryTables | None
    num_context_tokens: int
    scale: float
    sink_tokens: int
    recent_tokens: int
    seed: int
    first_position: int = 0
    keep_ratio: float = 1.0
    soft_cap: float | None = None
    sink_logits: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def unrotated_keys(self, part: slice | None = None) -> torch.Tensor:
        """Keys before rotary embedding, float32 ``[H, T, D]``; of some of the tokens, if given."""
        part = part or slice(0, self.keys.shape[1])
        return unrotated(self.keys[:, part], self.rotary, self.positions_of(part))

    def positions_of(self, part: slice) -> torch.Tensor:
        """Positions of some of the tokens, int64 ``[H, S]``, or ``[S]`` if alike for all heads."""
        if self.positions is not None:
            return self.positions[:, part].to(torch.int64)
        first = self.first_position
        return torch.arange(first + part.start, first + part.stop, device=self.keys.device)
