"""Rows of the quality table: a scorer in a mode, and the plugin's settings for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from vllm_kvzip.scoring import scorer_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.config import Mode

ROWS = (
    "default",
    "kvzip",
    "kvzip+adaptive-per-layer",
    "kvzip+uniform",
    "surrogate",
    "keydiff",
    "expected-attention",
    "window",
    "streaming",
    "random",
)


@dataclass(frozen=True)
class Row:
    """A row of the table: a scorer in a mode.

    Attributes:
        scorer: see :func:`settings_of`.
        mode: what becomes of the rest.
        formats: of quantized keys and values, ``nf4`` or ``int8+nf4``; "" for the default.
        full_share: of mode ``mixed``; None for the default.
        evicts: False for mode ``quantize`` with every KV pair in it, where no scorer matters.
    """

    scorer: str
    mode: Mode = "evict"
    formats: str = ""
    full_share: float | None = None
    evicts: bool = True

    @property
    def name(self) -> str:
        """As it stands in the table."""
        quantized = f"{self.mode} {self.formats}".strip()
        if not self.evicts:
            return f"{quantized}, nothing evicted"
        share = "" if self.full_share is None else f", {self.full_share:g} full"
        return f"{self.scorer}, {quantized}{share}"

    def settings(self, ratio: float, by_bytes: bool) -> dict[str, Any]:
        """The plugin's settings for this row.

        Args:
            ratio: kept / all, of KV pairs.
            by_bytes: of bytes instead.
        """
        settings = settings_of(self.scorer, ratio if self.evicts else 1.0)
        if by_bytes and self.evicts:
            settings["keep_bytes_ratio"] = settings.pop("keep_ratio")
        if self.mode == "evict":
            return settings
        settings["mode"] = self.mode
        if self.formats:
            keys, _, values = self.formats.partition("+")
            settings |= {"key_format": keys, "value_format": values or keys}
        if self.full_share is not None:
            settings["full_share"] = self.full_share
        return settings


def make_rows(
    scorers: Sequence[str],
    modes: Sequence[Mode],
    formats: Sequence[str],
    full_shares: Sequence[float | None],
) -> list[Row]:
    """Every scorer in every mode, and mode ``quantize`` without eviction first, if it is asked for.

    Args:
        scorers, modes: see :class:`Row`.
        formats: of the modes that quantize.
        full_shares: of mode ``mixed``.
    """
    rows = []
    if "quantize" in modes:
        rows += [Row("default", "quantize", each, evicts=False) for each in formats]
    for scorer, mode in product(scorers, modes):
        quantized = formats if mode != "evict" else [""]
        shares = full_shares if mode == "mixed" else [None]
        rows += [Row(scorer, mode, each, share) for each, share in product(quantized, shares)]
    return rows


def settings_of(row: str, keep_ratio: float) -> dict[str, Any]:
    """The plugin's settings: ``default``, or a scorer with its own budget or a named one.

    A scorer of which only the name is given must do without the head profile's budgets.
    """
    settings: dict[str, Any] = {"keep_ratio": keep_ratio, "min_prompt_tokens": 0}
    if row == "default":
        return settings
    scorer, _, budget = row.partition("+")
    return {
        **settings,
        "scorer": scorer,
        "budget": budget or scorer_class(scorer).default_budget or "adaptive",
    }
