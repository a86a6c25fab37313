"""Worker side: read contexts and repeat them without any KV cache, to learn what heads look at.

Runs after the model is loaded and before vLLM measures memory and allocates its cache. Keys and
values of a context are caught where a layer hands them to its attention. Layers with a sliding
window are not scored: they attend within their window, over the end of the context and what repeats
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.model.fused_attention import attend_with_normaliser
from vllm_kvzip.model.windowed_attention import attend_within_window
from vllm_kvzip.vllm_bridge.passes.pass_metadata import PassMetadata, logit_terms
from vllm_kvzip.vllm_bridge.passes.scoring_pass import ReconstructionPass
from vllm_kvzip.vllm_bridge.symbols import set_forward_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatedContext, Segment
    from vllm_kvzip.vllm_bridge.passes.window_pass import KeysAndValues

CHECKED_TOKENS = 256  # of each chunk; logits of a large vocabulary are large


class CaughtCache:
    """Keys and values of one context, read like the engine's cache: a head page is one token.

    Args:
        geometry: of the model, with blocks of one token.
        layer_index: vLLM's layer name -> layer, of those that are scored.
        device: of the model.
        windows: vLLM's layer name -> tokens that its sliding window holds, of the other layers.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        layer_index: dict[str, int],
        device: torch.device,
        windows: dict[str, int] | None = None,
    ) -> None:
        self.geometry = geometry
        self.layer_index = layer_index
        self.device = device
        self.windows = windows or {}
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.window_ends: dict[str, KeysAndValues] = {}
        self.pool = self.store = self

    def page_ids(self, blocks: torch.Tensor) -> torch.Tensor:
        """Positions of some tokens, int64 ``[L, H, T]``."""
        return blocks.expand(self.geometry.num_layers, self.geometry.num_kv_heads, -1)

    def read_keys(self, pages: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys ``[H, T, D]`` at positions ``[H, T]``, which are the same in all heads."""
        return self.layers[layer][0][:, pages[0]]

    def read_values(self, pages: torch.Tensor, layer: int) -> torch.Tensor:
        """Values; see :meth:`read_keys`."""
        return self.layers[layer][1][:, pages[0]]

    def read_end(self, name: str, context: RepeatedContext) -> KeysAndValues:
        """See :class:`~vllm_kvzip.vllm_bridge.passes.window_pass.WindowEnds`."""
        return self.window_ends[name]


@dataclass(frozen=True)
class ReadingMetadata(PassMetadata):
    """Attention metadata of a pass that reads a context; its keys and values go into ``cache``."""

    cache: CaughtCache

    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Causal attention over the tokens of the pass; see :class:`PassMetadata`."""
        keys, values = (
            half.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            for half in (key, value)
        )
        self.cache.layers[self.cache.layer_index[layer.layer_name]] = (keys, values)
        group = query.shape[1] // key.shape[1]
        attended, _ = attend_with_normaliser(
            query.transpose(0, 1),
            keys.repeat_interleave(group, dim=0),
            values.repeat_interleave(group, dim=0),
            impl.scale,
            causal=True,
            **logit_terms(impl),
        )
        output.copy_(attended.transpose(0, 1))


@dataclass(frozen=True)
class WindowReadingMetadata(PassMetadata):
    """The same of layers with a sliding window; ``cache`` keeps the context's last tokens."""

    cache: CaughtCache

    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Within the window; see :class:`PassMetadata`."""
        name = layer.layer_name
        window = self.cache.windows[name]
        attended = attend_within_window(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            impl.scale,
            window,
            **logit_terms(impl),
        )
        output.copy_(attended.transpose(0, 1))
        last = slice(max(0, len(key) - window + 1), None)
        ends = key[last].transpose(0, 1).clone(), value[last].transpose(0, 1).clone()
        self.cache.window_ends[name] = ends


class CalibrationPass(ReconstructionPass):
    """Reads contexts and lets the model repeat them; arguments as those of the base class."""

    _right = 0
    _checked = 0

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read one context and repeat it; its keys and values stay in the cache.

        Returns:
            float32 ``[L, H, T]``, reconstruction scores.
        """
        cache: CaughtCache = self._store
        ids = torch.tensor(token_ids, dtype=torch.int32, device=cache.device)
        positions = torch.arange(len(token_ids), device=cache.device)
        by_layer: dict[str, PassMetadata] = {
            **dict.fromkeys(cache.layer_index, ReadingMetadata(cache)),
            **dict.fromkeys(cache.windows, WindowReadingMetadata(cache)),
        }
        with set_forward_context(
            by_layer, self._vllm_config, num_tokens=len(token_ids), skip_compiled=True
        ):
            self._model(input_ids=ids, positions=positions)
        context = self.begin(token_ids, range(len(token_ids)))
        self.go_on([(context, context.num_left)])
        return context.scores

    @property
    def repeated_share(self) -> float:
        """Share of the tokens that the model repeated right, in [0, 1]."""
        return int(self._right) / max(1, self._checked)

    def _forward(self, segments: list[Segment]) -> torch.Tensor:
        hidden = super()._forward(segments)
        for segment in segments:
            length = segment.chunk.end - segment.chunk.start
            count = min(CHECKED_TOKENS, length)
            rows = hidden[segment.end - count - 1 : segment.end - 1]
            predicted = self._model.compute_logits(rows).argmax(dim=-1)
            wanted = torch.tensor(segment.chunk.input_ids[-count:], device=predicted.device)
            self._right = self._right + (predicted == wanted).sum()
            self._checked += count
        return hidden
