"""Worker side: layers with a sliding window, while the model repeats a context.

Such layers are not scored. What repeats the context comes after it in one sequence: each token sees
as many tokens before it as the window holds, first the end of the context and then what has been
repeated of its own chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_kvzip.model.windowed_attention import attend_within_window
from vllm_kvzip.vllm_bridge.passes.pass_metadata import PassMetadata, logit_terms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatedContext, Segment

    KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class WindowEnds(Protocol):
    """Reads the end of a context in layers with a sliding window.

    Attributes:
        windows: vLLM's layer name -> tokens that its window holds, a token's own among them.
    """

    @property
    def windows(self) -> Mapping[str, int]: ...

    def read_end(self, name: str, context: RepeatedContext) -> KeysAndValues:
        """Keys and values ``[H, n, D]`` of a context's last tokens.

        Args:
            name: vLLM's, of the layer.
            context: while it is repeated. As many tokens are read as the token after them sees.
        """
        ...


@dataclass(frozen=True)
class WindowMetadata(PassMetadata):
    """Attention metadata of layers with a sliding window.

    Attributes:
        segments: whose chunk lies in which rows.
        ends: reads what comes before them.
    """

    segments: Sequence[Segment]
    ends: WindowEnds

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
        name: str = layer.layer_name
        for segment in self.segments:
            rows = slice(segment.start, segment.end)
            before = self.ends.read_end(name, segment.context)
            output[rows] = attend_after(
                before, query[rows], key[rows], value[rows], impl, self.ends.windows[name]
            )


def attend_after(
    before: KeysAndValues,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    impl: Any,
    window: int,
) -> torch.Tensor:
    """Attention of some tokens within their window.

    Args:
        before: keys and values ``[H, n, D]`` of tokens before them.
        query: ``[R, H * G, D]``.
        key, value: ``[R, H, D]``.
        impl: see :meth:`PassMetadata.attend`.
        window: tokens that it holds.

    Returns:
        like ``query``.
    """
    keys, values = (
        torch.cat([cached, own.transpose(0, 1)], dim=1)
        for cached, own in zip(before, (key, value), strict=True)
    )
    attended = attend_within_window(
        query.transpose(0, 1), keys, values, impl.scale, window, **logit_terms(impl)
    )
    return attended.transpose(0, 1)
