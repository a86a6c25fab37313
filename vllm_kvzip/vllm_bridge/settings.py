"""The resolved settings of one engine, and how they travel to every vLLM process.

They ride in ``VllmConfig.additional_config["kvzip"]`` as plain JSON values: vLLM hands that
dictionary to the engine core and to every worker, on every node. A profile is resolved to head
fractions before it travels, so that no other process has to find the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vllm_kvzip import __version__
from vllm_kvzip.config import DEFAULT_FULL_SHARE, Budget, KVzipConfig
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.head_profiles.head_profile import interpolate
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.round_tiers import least_budget
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.scoring import scorer_class
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.stats_export import FOLDER_VARIABLE

if TYPE_CHECKING:
    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

KEY = "kvzip"
PREFIX_FORMAT = 4  # how a compressed prefix lies in its blocks
SHAPING_SETTINGS = (
    "sink_tokens",
    "recent_tokens",
    "observation_window_tokens",
    "scoring_chunk_tokens",
    "seed",
    "prefill_budget",
    "decode_budget",
    "mode",
    "full_share",
    "key_format",
    "value_format",
    "rotation",
)


@dataclass(frozen=True)
class Settings:
    """What every process of one engine needs to know.

    Attributes:
        config: what the user asked for.
        scorer, budget: what is used, where the user left it open.
        head_budgets: keep ratio -> ``[layers][KV heads]``, share of its KV pairs each head keeps
            (budget ``profile``); None for the other budgets.
        head_importance: ``[layers][KV heads]``, which heads come first (``profile`` and
            ``retrieval``); None for the other budgets.
        head_tiers: bytes ratio -> ``[layers][KV heads]``, shares ``full`` and ``kept`` of budget
            ``profile`` in mode ``mixed``, and the mean ``shares`` by ratio; None: full and
            quantized pages are dealt by ``head_budgets``.
        repeat_ids: token ids that ask for the context, of its first chunk and of the later ones,
            for a scorer that lets the model repeat it.
        surrogate, surrogate_digest: file of the trained networks and its SHA-256, for a scorer that
            wants it. Every worker reads the file.
        loss_curve: power and points of a :class:`~vllm_kvzip.budgeting.quality.LossCurve`, where a
            quality loss decides.
        profile_to_build: file of the head profile that the worker makes first; the worker then
            resolves the settings anew.
        metrics_directory: folder of the metric files, or None when ``PROMETHEUS_MULTIPROC_DIR``
            of the environment serves.
    """

    config: KVzipConfig
    scorer: str
    budget: Budget
    head_budgets: dict[str, list[list[float]]] | None = None
    head_importance: list[list[float]] | None = None
    head_tiers: dict[str, Any] | None = None
    repeat_ids: list[list[int]] | None = None
    surrogate: str | None = None
    surrogate_digest: str | None = None
    loss_curve: dict[str, Any] | None = None
    profile_to_build: str | None = None
    metrics_directory: str | None = None

    @property
    def observation_tokens(self) -> int:
        """How many of the last queries the scorer looks at, in rounds or ever; 0: none."""
        scorer, config = scorer_class(self.scorer), self.config
        has_rounds = config.prefill_budget is not None or config.decode_budget is not None
        if not scorer.needs_observation_queries:
            return 0
        if scorer.observes_rounds_only and not has_rounds:
            return 0
        return max(self.config.observation_window_tokens, scorer.min_observation_tokens)

    @property
    def prompt_observation_tokens(self) -> int:
        """The same where a prompt or a context is compressed that is no round."""
        return 0 if scorer_class(self.scorer).observes_rounds_only else self.observation_tokens

    def quantization(self, block_size: int, head_dim: int, itemsize: int) -> Quantization | None:
        """How quantized pages are written; None in mode ``evict``.

        Args:
            block_size: tokens per block.
            head_dim: D.
            itemsize: bytes of a number of the KV cache.

        Raises:
            ConfigError: if a format does not suit the cache, or would save nothing.
        """
        config = self.config
        if config.mode == "evict":
            return None
        from vllm_kvzip.quantization import choose_quantization

        page_tokens = block_size // running_platform().pages_per_head(block_size)
        try:
            chosen = choose_quantization(
                page_bytes=2 * page_tokens * head_dim * itemsize,
                head_dim=head_dim,
                keys=config.key_format,
                values=config.value_format,
                rotation=config.rotation,
            )
        except ValueError as error:
            raise ConfigError(
                f"mode {config.mode} does not work here: {error}; choose another format."
            ) from error
        if chosen.head_page_tokens <= page_tokens:
            raise ConfigError(
                f"mode {config.mode}: {config.key_format} keys and {config.value_format} values "
                f"are no smaller than the KV cache's own; choose another format."
            )
        return chosen

    def rule(self, block_size: int, head_dim: int, itemsize: int) -> PrefixRule:
        """What follows from a prompt's length and options; scheduler and workers use the same.

        Args:
            block_size, head_dim, itemsize: see :meth:`quantization`.
        """
        quantization = self.quantization(block_size, head_dim, itemsize)
        pages_per_head = running_platform().pages_per_head(block_size)
        tiers = None
        if quantization is not None:
            by_bytes = self.config.keep_bytes_ratio is not None
            points = self.head_tiers["shares"] if self.head_tiers else []
            tiers = TierRule(
                self.config.mode,
                block_size,
                quantization.layout.page_tokens,
                split=quantization.split * pages_per_head,
                full_share=self.config.full_share or DEFAULT_FULL_SHARE,
                by_bytes=by_bytes,
                shares=tuple((held if by_bytes else kept, full) for held, kept, full in points),
            )
        return PrefixRule(
            keep_ratio=self.config.ratio,
            min_prompt_tokens=self.config.min_prompt_tokens,
            sink_tokens=self.config.sink_tokens,
            recent_tokens=self.config.recent_tokens,
            block_size=block_size,
            min_output_tokens=self.config.min_output_tokens,
            prefill_blocks=self.budget_blocks("prefill_budget", block_size),
            decode_blocks=self.budget_blocks("decode_budget", block_size),
            tiers=tiers,
            pages_per_head=pages_per_head,
            quality_loss=self.config.quality_loss,
        )

    def repeat_rule(self, vllm_config: VllmConfig) -> RepeatRule | None:
        """How the model repeats contexts; None where the scorer does not ask for it.

        Args:
            vllm_config: of the engine.
        """
        if self.repeat_ids is None:
            return None
        from vllm_kvzip.planning.reconstruction import RepeatRule

        most = vllm_config.scheduler_config.max_num_batched_tokens
        return RepeatRule.fitting(
            self.config.scoring_chunk_tokens,
            min(most, vllm_config.model_config.max_model_len),
            *map(len, self.repeat_ids),
        )

    def budget_blocks(
        self, name: Literal["prefill_budget", "decode_budget"], block_size: int
    ) -> int | None:
        """A budget in blocks; None where there is none.

        Args:
            name: of the setting.
            block_size: tokens per block.

        Raises:
            ConfigError: if it is too small to work with.
        """
        tokens: int | None = getattr(self.config, name)
        if tokens is None:
            return None
        if tokens < (least := self.least_budget(block_size)):
            protected = self.config.sink_tokens + self.config.recent_tokens
            where = " in each tier" if self.config.mode == "mixed" else ""
            raise ConfigError(
                f"{name}={tokens} must be at least {least}: two blocks of {block_size} "
                f"tokens, and room for the {protected} tokens that every head keeps{where}."
            )
        return tokens // block_size

    def least_budget(self, block_size: int) -> int:
        """The fewest tokens that a prefill or decode budget may have."""
        protected = self.config.sink_tokens + self.config.recent_tokens
        return least_budget(protected, block_size, self.config.mode) * block_size

    def head_fractions(self, keep_ratio: float) -> list[list[float]]:
        """Share of its KV pairs each head keeps, for budgets ``profile`` and ``retrieval``.

        Returns:
            ``[layers][KV heads]``, all ranks' heads.
        """
        if self.head_budgets is not None:
            return interpolate(self.head_budgets, keep_ratio)
        import torch

        from vllm_kvzip.planning.reconstruction import retrieval_fractions

        importance = torch.tensor(self.head_importance)
        fractions: list[list[float]] = retrieval_fractions(importance, keep_ratio).tolist()
        return fractions

    def tier_fractions(self, bytes_ratio: float) -> tuple[list[list[float]], list[list[float]]]:
        """Shares of its KV pairs each head keeps as they are, and in either tier.

        Returns:
            ``[layers][KV heads]`` each, all ranks' heads.
        """
        assert self.head_tiers is not None
        full, kept = (interpolate(self.head_tiers[name], bytes_ratio) for name in ("full", "kept"))
        return full, kept

    def shape(self, block_size: int) -> dict[str, Any]:
        """Everything that shapes a compressed prefix but its keep ratio, as plain values.

        Args:
            block_size: tokens per block.
        """
        return {
            "format": PREFIX_FORMAT,
            "version": __version__,
            "block_size": block_size,
            "pages_per_head": running_platform().pages_per_head(block_size),
            "scorer": self.scorer,
            "budget": self.budget,
            "by_bytes": self.config.keep_bytes_ratio is not None,
            "head_budgets": self.head_budgets,
            "head_importance": self.head_importance,
            "head_tiers": self.head_tiers,
            "repeat_ids": self.repeat_ids,
            "surrogate": self.surrogate_digest,
            "loss_curve": self.loss_curve,
            **{name: getattr(self.config, name) for name in SHAPING_SETTINGS},
        }

    def fingerprint(self, block_size: int) -> str:
        """Hexadecimal digest of :meth:`shape`.

        Args:
            block_size: tokens per block.
        """
        text = json.dumps(self.shape(block_size), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_additional_config(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of :meth:`from_vllm_config`."""
        return {
            "config": self.config.model_dump(mode="json"),
            "scorer": self.scorer,
            "budget": self.budget,
            "head_budgets": self.head_budgets,
            "head_importance": self.head_importance,
            "head_tiers": self.head_tiers,
            "repeat_ids": self.repeat_ids,
            "surrogate": self.surrogate,
            "surrogate_digest": self.surrogate_digest,
            "loss_curve": self.loss_curve,
            "profile_to_build": self.profile_to_build,
        }

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> Settings:
        """Read the settings that :meth:`to_additional_config` stored.

        Raises:
            KeyError: if compression is off for this engine.
        """
        values = vllm_config.additional_config[KEY]
        return cls(
            **{**values, "config": KVzipConfig.model_validate(values["config"])},
            metrics_directory=os.environ.get(FOLDER_VARIABLE),
        )


def block_tokens(vllm_config: VllmConfig) -> int:
    """Tokens per block of the compressed layers, as far as this process knows.

    Workers make blocks larger where the states of other layers must fit into them. vLLM tells the
    API server once they have.
    """
    cache = vllm_config.cache_config
    told: int | None = getattr(cache, "effective_attention_block_size", None)
    return told or int(cache.block_size)


def pool_blocks(vllm_config: VllmConfig) -> int:
    """Blocks of one engine's KV cache, as a server knows them; 0 before its engines have started.

    vLLM adds up those of all data-parallel engines that the server talks to.
    """
    parallel = vllm_config.parallel_config
    engines = parallel.data_parallel_size
    if parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    if parallel.data_parallel_rank_local is not None:
        engines = 1
    return (vllm_config.cache_config.num_gpu_blocks or 0) // max(1, engines)


def cache_shape(vllm_config: VllmConfig) -> tuple[int, int, int]:
    """Tokens per block, head size, and bytes per number of an engine's KV cache."""
    from vllm_kvzip.vllm_bridge.symbols import kv_cache_dtype_str_to_dtype

    model = vllm_config.model_config
    dtype = kv_cache_dtype_str_to_dtype(running_cache_dtype(vllm_config), model)
    return block_tokens(vllm_config), int(model.get_head_size()), dtype.itemsize
