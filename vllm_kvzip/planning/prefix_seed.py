"""A number for a prefix: equal for equal tokens, in every process."""

from __future__ import annotations

import zlib
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def prefix_seed(token_ids: Sequence[int], boundary_tokens: int) -> int:
    """A number that depends on the tokens before the boundary only."""
    return zlib.crc32(array("q", token_ids[:boundary_tokens]).tobytes())


def checksum(seed: int) -> str:
    """A seed as eight hexadecimal digits, by which a client finds its context."""
    return f"{seed:08x}"
