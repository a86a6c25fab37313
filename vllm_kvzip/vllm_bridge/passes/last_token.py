"""Worker side: compute the last token of a context before vLLM does.

A request whose context is repeated over several steps may wait one token before the context's end
(``vllm_bridge/scheduler/repeat_schedule.py``). Layers with full attention do not miss that token:
each chunk is repeated looking at itself. Layers with a sliding window see it from the first
repeated token on. So it runs through the model once, over the context as it lies in the cache,
and what those layers make of it is kept beside the cache until the context has been repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.passes.pass_metadata import PassMetadata, attend_over_both
from vllm_kvzip.vllm_bridge.passes.window_pass import attend_after

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatedContext
    from vllm_kvzip.vllm_bridge.passes.window_pass import KeysAndValues, WindowEnds

    FoundParts = list[dict[str, KeysAndValues]]


def last_token_metadata(
    contexts: Sequence[RepeatedContext],
    store: PageStore,
    layer_index: Mapping[str, int],
    ends: WindowEnds,
) -> tuple[dict[str, PassMetadata], FoundParts]:
    """Attention metadata of a pass whose rows are the last tokens of some contexts.

    Args:
        contexts: one for each row.
        store: the pool of head pages.
        layer_index: vLLM's layer name -> layer, of those that are scored.
        ends: of the layers with a sliding window.

    Returns:
        metadata by vLLM's layer name; and a dictionary for each context, into which the pass puts
        keys and values ``[H, 1, D]`` of its last token by the name of each layer with a window.
    """
    found: FoundParts = [{} for _ in contexts]
    return {
        **dict.fromkeys(layer_index, LastTokenMetadata(contexts, store, layer_index)),
        **dict.fromkeys(ends.windows, LastTokenInWindow(contexts, ends, found)),
    }, found


@dataclass(frozen=True)
class LastTokenMetadata(PassMetadata):
    """Of layers with full attention; attributes as in :func:`last_token_metadata`."""

    contexts: Sequence[RepeatedContext]
    store: PageStore
    layer_index: Mapping[str, int]

    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Over the context before each token, and the token; see :class:`PassMetadata`."""
        index, num_heads = self.layer_index[layer.layer_name], key.shape[1]
        for row, context in enumerate(self.contexts):
            num_before, pages = len(context.token_ids) - 1, context.pages[index]
            attended, _ = attend_over_both(
                query[row].unflatten(0, (num_heads, -1)),
                self.store.read_keys(pages, index)[:, :num_before],
                self.store.read_values(pages, index)[:, :num_before],
                key[row, :, None],
                value[row, :, None],
                impl,
            )
            output[row] = attended.flatten(0, 1)


@dataclass(frozen=True)
class LastTokenInWindow(PassMetadata):
    """Of layers with a sliding window; attributes as in :func:`last_token_metadata`."""

    contexts: Sequence[RepeatedContext]
    ends: WindowEnds
    found: FoundParts

    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Within each token's window; see :class:`PassMetadata`."""
        name: str = layer.layer_name
        for row, context in enumerate(self.contexts):
            own = slice(row, row + 1)
            before = self.ends.read_end(name, context)
            output[own] = attend_after(
                before, query[own], key[own], value[own], impl, self.ends.windows[name]
            )
            self.found[row][name] = key[row, :, None].clone(), value[row, :, None].clone()
