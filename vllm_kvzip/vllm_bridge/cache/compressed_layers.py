"""The layers that are compressed, as vLLM made them in one worker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
    from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup


@dataclass(frozen=True)
class CompressedLayers:
    """Which of them a worker has, and which part of each.

    Attributes:
        group: their KV cache group, whose order is the order of layers everywhere.
        spec: of the group.
        by_name: vLLM's attention layers.
        builders: vLLM's metadata builders of the group.
        heads: this rank's KV heads, among those of all ranks.
        rows: this pipeline stage's layers, among the compressed ones of all stages.
        num_rows: these of all stages.
        num_drafts: of the layers the last ones, which are a draft model's.
    """

    group: CompressedGroup
    spec: HeadPageSpec
    by_name: dict[str, Any]
    builders: list[Any]
    heads: slice
    rows: slice
    num_rows: int
    num_drafts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """vLLM's names of the layers that are compressed: all but a draft model's."""
        return self.group.layer_names[: self.group.num_layers - self.num_drafts]

    @property
    def numbers(self) -> list[int]:
        """Where they are among all layers of the model, as their names say."""
        found = [re.search(r"\.(\d+)\.", name) for name in self.names]
        return [int(number[1]) if number else at for at, number in enumerate(found)]

    @property
    def first(self) -> Any:
        """Any of them; they are all alike."""
        return next(iter(self.by_name.values()))

    def part_of(self, grid: list[list[float]] | None) -> list[list[float]] | None:
        """A budget's numbers by head, of this worker's layers and KV heads.

        Args:
            grid: ``[layers][KV heads]`` of the whole model.
        """
        return None if grid is None else [row[self.heads] for row in grid[self.rows]]
