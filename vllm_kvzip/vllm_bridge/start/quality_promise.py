"""What a quality loss needs: a measured curve of the scorer's scores, and an engine that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.head_profiles.head_profile import load_profile
from vllm_kvzip.vllm_bridge.drafts import has_draft_layers

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_kvzip.config import Budget, KVzipConfig
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def loss_curve(
    vllm_config: VllmConfig, config: KVzipConfig, scorer: str, budget: Budget, path: Path | None
) -> dict[str, Any] | None:
    """Power and points of the curve that a quality loss is read from; None without a loss.

    Args:
        vllm_config: of the engine.
        config: what the user asked for.
        scorer, budget: what it comes to.
        path: of the head profile.

    Raises:
        ConfigError: naming what does not go together with ``quality_loss``, and what to do.
    """
    if config.quality_loss is None:
        return None
    curves = (load_profile(path).quality if path is not None else None) or {}
    if scorer not in curves:
        found = "no head profile matches this model" if path is None else f"{path} has none"
        known = f" but of {', '.join(curves)}" if curves else ""
        raise ConfigError(
            f"quality_loss needs a head profile with a loss curve of scorer {scorer}, and {found}"
            f"{known}; build one with `vllm-kvzip profile`, or remove quality_loss."
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    others = {
        f"mode {config.mode}": config.mode != "evict",
        f"budget {budget}": budget != "adaptive",
        "prefill_budget": config.prefill_budget is not None,
        "decode_budget": config.decode_budget is not None,
        "keep_bytes_ratio": config.keep_bytes_ratio is not None,
        "a draft model": has_draft_layers(vllm_config),
        f"--pipeline-parallel-size {stages}": stages > 1,
    }
    for other, is_there in others.items():
        if is_there:
            raise ConfigError(
                f"quality_loss does not work with {other} yet, because it decides over evicted "
                f"KV pairs and one ranking of all of them; remove one of the two."
            )
    return curves[scorer].model_dump(mode="json")
