"""How much of a request's KV cache the compressed layers hold, beside layers of other kinds.

A page is what one layer has in one block. vLLM gives the pages of all layers of a model the same
size, so pages can be counted instead of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class AlikeLayers:
    """Layers that hold their KV cache in the same way.

    Attributes:
        num_layers: how many.
        window: tokens that each looks back on; None: it attends to the whole context, or holds a
            state.
        state_blocks: blocks that hold a layer's state, whatever the length of the context; None: it
            holds KV pairs.
    """

    num_layers: int
    window: int | None = None
    state_blocks: int | None = None

    def blocks(self, num_tokens: int, block_size: int) -> int:
        """Blocks that one request holds in each of these layers while its answer begins.

        vLLM keeps the blocks of a window. A window may begin inside a block, so there can be one
        more than the window fills.

        Args:
            num_tokens: of the request.
            block_size: tokens per block.
        """
        if self.state_blocks is not None:
            return self.state_blocks
        whole = -(-num_tokens // block_size)
        if self.window is None:
            return whole
        return min(whole, -(-self.window // block_size) + 1)


def compressed_share(
    num_layers: int, others: Iterable[AlikeLayers], num_tokens: int, block_size: int
) -> float:
    """Share of the bytes of an uncompressed request that lies in the layers that are compressed.

    Args:
        num_layers: that attend to the whole context; they are compressed.
        others: the layers that are left alone.
        num_tokens: of the request.
        block_size: tokens per block.

    Returns:
        in (0, 1].
    """
    own = num_layers * AlikeLayers(num_layers).blocks(num_tokens, block_size)
    rest = sum(layers.num_layers * layers.blocks(num_tokens, block_size) for layers in others)
    return own / (own + rest)


def in_percent(share: float) -> str:
    """A share in words; only all is 100 %."""
    text = f"{share:.0%}"
    return ">99%" if text == "100%" and share < 1 else text
