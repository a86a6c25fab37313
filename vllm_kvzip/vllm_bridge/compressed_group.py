"""The KV cache group whose layers are compressed.

vLLM splits the layers of a model into KV cache groups. Layers of one group share a block table, and
vLLM's messages hold one entry per group: a request's block ids are one list per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from vllm_kvzip.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig, VllmConfig

Entry = TypeVar("Entry")

NULL_BLOCK = 0
"""vLLM's block that fills rows where a group holds nothing."""


def block_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one block of a worker: groups share the pool, and the largest of them sizes it."""
    return max(
        int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)
        for group in kv_cache_config.kv_cache_groups
    )


@dataclass(frozen=True)
class CompressedGroup:
    """Which of vLLM's KV cache groups is compressed, and which layers it has.

    Attributes:
        group_id: index of the group in everything that vLLM keeps per group.
        layer_names: vLLM's names of its layers, in the group's order.
        block_sizes: tokens per block of each group.
    """

    group_id: int
    layer_names: tuple[str, ...]
    block_sizes: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the group: one block holds KV pairs of all of them."""
        return len(self.layer_names)

    @classmethod
    def find(cls, kv_cache_config: KVCacheConfig, spec_type: type) -> CompressedGroup:
        """The one group whose spec is a ``spec_type``.

        Args:
            kv_cache_config: vLLM's, of the scheduler or of a worker.
            spec_type: what the specs of compressed layers are instances of.

        Raises:
            UnsupportedError: if no group has such a spec, or several groups have.
        """
        groups = kv_cache_config.kv_cache_groups
        found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, spec_type)]
        if len(found) != 1:
            kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
            raise UnsupportedError(
                f"KV compression needs exactly one KV cache group of compressed layers, but vLLM "
                f"made {len(found)} (specs of all groups: {kinds}); run this model without "
                f"--kv-compression."
            )
        names = tuple(groups[found[0]].layer_names)
        return cls(found[0], names, tuple(group.kv_cache_spec.block_size for group in groups))

    def share_of_pool(self, kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> int:
        """Blocks of the pool that the group can have while the others serve one long request.

        Scheduler and workers must get the same number.

        Args:
            kv_cache_config: vLLM's, of the scheduler or of a worker.
            vllm_config: of the engine.
        """
        others = [
            group.kv_cache_spec
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            if group_id != self.group_id
        ]
        taken = sum(-(-s.max_memory_usage_bytes(vllm_config) // s.page_size_bytes) for s in others)
        return int(max(0, kv_cache_config.num_blocks - taken))

    def row(self, block_ids: Sequence[Sequence[Entry]]) -> Sequence[Entry]:
        """This group's entry of what vLLM keeps per group, such as a request's block ids.

        Args:
            block_ids: one sequence per KV cache group.
        """
        return block_ids[self.group_id]

    def rows_of_others(self, block_ids: Sequence[Sequence[Entry]]) -> dict[int, Sequence[Entry]]:
        """The same of all other groups, by their index."""
        return {index: row for index, row in enumerate(block_ids) if index != self.group_id}
