"""The resolved settings of one engine, and how they travel to every vLLM process.

They ride in ``VllmConfig.additional_config["kvzip"]`` as plain JSON values: vLLM hands that
dictionary to the engine core and to every worker, on every node. A profile is resolved to head
fractions before it travels, so that no other process has to find the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.config import KVzipConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "kvzip"


@dataclass(frozen=True)
class Settings:
    """What every process of one engine needs to know.

    Attributes:
        config: what the user asked for.
        scorer, budget: what is used, where the user left it open.
        head_fractions: ``[layers][KV heads]``, share of its KV pairs each head keeps at
            ``config.keep_ratio`` (budget ``profile``); None for the other budgets.
        head_importance: ``[layers][KV heads]``, which heads come first; likewise.
        metrics_directory: folder of the metric files, or None when ``PROMETHEUS_MULTIPROC_DIR``
            of the environment serves.
    """

    config: KVzipConfig
    scorer: str
    budget: str
    head_fractions: list[list[float]] | None = None
    head_importance: list[list[float]] | None = None
    metrics_directory: str | None = None

    def to_additional_config(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of :meth:`from_vllm_config`."""
        return {
            "config": self.config.model_dump(mode="json"),
            "scorer": self.scorer,
            "budget": self.budget,
            "head_fractions": self.head_fractions,
            "head_importance": self.head_importance,
            "metrics_directory": self.metrics_directory,
        }

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> Settings:
        """Read the settings that :meth:`to_additional_config` stored.

        Raises:
            KeyError: if compression is off for this engine.
        """
        values = vllm_config.additional_config[KEY]
        return cls(**{**values, "config": KVzipConfig.model_validate(values["config"])})
