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

    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class CompressedGroup:
    """Which of vLLM's KV cache groups is compressed, and which layers it has.

    Attributes:
        group_id: index of the group in everything that vLLM keeps per group.
        layer_names: vLLM's names of its layers, in the group's order.
    """

    group_id: int
    layer_names: tuple[str, ...]

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
        return cls(found[0], tuple(groups[found[0]].layer_names))

    def row(self, block_ids: Sequence[Sequence[Entry]]) -> Sequence[Entry]:
        """This group's entry of what vLLM keeps per group, such as a request's block ids.

        Args:
            block_ids: one sequence per KV cache group.
        """
        return block_ids[self.group_id]
