"""Flags, environment and ``additional_config`` to an engine that compresses.

Runs where the engine's configuration is made: in the API server or in the process of ``LLM``. It
changes nothing unless compression was asked for.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvzip.contexts.folder import check_folder
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.head_profiles.head_profile import (
    check_matches,
    find_profile,
    load_profile,
    profile_folders,
)
from vllm_kvzip.model.attention_kinds import caps_logits, has_sinks
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_capped_logits, check_sinks
from vllm_kvzip.vllm_bridge.connectors.accepted import check_connector
from vllm_kvzip.vllm_bridge.fingerprint import model_fingerprint
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.settings import KEY, Settings, cache_shape
from vllm_kvzip.vllm_bridge.start.checks import (
    check_attention_kernel,
    check_budget_in_tokens,
    check_page_code,
    check_profile_build,
    check_scoring_passes,
    check_supported,
)
from vllm_kvzip.vllm_bridge.start.gpu_backend import default_gpu_backend
from vllm_kvzip.vllm_bridge.start.quality_promise import loss_curve
from vllm_kvzip.vllm_bridge.symbols import init_logger
from vllm_kvzip.vllm_bridge.versions import check_version, untested_warning

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget, KVzipConfig
    from vllm_kvzip.scoring import Scorer
    from vllm_kvzip.vllm_bridge.symbols import EngineArgs, VllmConfig

logger = init_logger("vllm." + __name__)

SCHEDULERS = {
    False: "vllm_kvzip.vllm_bridge.scheduler.scheduler.HeadPageScheduler",
    True: "vllm_kvzip.vllm_bridge.scheduler.scheduler.HeadPageAsyncScheduler",
}
SURROGATE_SUFFIX = ".safetensors"  # beside the profile, of the same name
MOST_TIER_MISMATCH = 0.1  # of the bytes of a quantized KV pair
DEFAULT_SCORER = "contrast"
DEFAULT_BUDGET: Budget = "adaptive"


def prepare_engine_args(engine_args: EngineArgs) -> None:
    """Choose the block size when the user named none: head pages of 128 tokens cost quality."""
    if engine_args.block_size is None:
        engine_args.block_size = running_platform().default_block_size


def configure(vllm_config: VllmConfig, config: KVzipConfig, serves: bool = False) -> None:
    """Check that everything fits together, and put worker and settings into vLLM's configuration.

    Args:
        vllm_config: of the engine; changed.
        config: what the user set.
        serves: whether the engine may answer over HTTP.

    Raises:
        KVzipError: with one sentence for the user.
    """
    check_version(serves)
    plan = check_supported(vllm_config)
    check_attention_kernel(config, running_cache_dtype(vllm_config))
    check_sinks(has_sinks(vllm_config.model_config.hf_text_config), config.attention_kernel)
    if warning := untested_warning():
        logger.warning(warning)
    if config.contexts_dir is not None:
        check_folder(Path(config.contexts_dir).expanduser())
    settings = _resolve(vllm_config, config)
    shape = cache_shape(plan.vllm_config)
    settings.rule(*shape)  # refuses what does not suit this cache
    check_page_code(settings.quantization(*shape))
    from vllm_kvzip.vllm_bridge.server.admission import check_requests

    check_requests()
    if serves:
        from vllm_kvzip.vllm_bridge.server.routes import check_routes

        check_routes()
    platform = running_platform()
    vllm_config.parallel_config.worker_cls = platform.worker_class
    if platform.attention_backends and vllm_config.attention_config.backend is None:
        vllm_config.attention_config.backend = default_gpu_backend(vllm_config)
    scheduling = vllm_config.scheduler_config
    scheduling.scheduler_cls = SCHEDULERS[bool(scheduling.async_scheduling)]
    values = {**vllm_config.additional_config, KEY: settings.to_additional_config()}
    vllm_config.additional_config = values


def _resolve(vllm_config: VllmConfig, config: KVzipConfig) -> Settings:
    """Fill in what the user left open: profile, scorer, budget, metrics folder."""
    from vllm_kvzip.vllm_bridge.stats_export import open_metrics_directory

    path = profile_path(vllm_config, config)
    if config.profile == "build":
        check_profile_build(vllm_config)
        if path is None:
            settings = resolve(vllm_config, without_profile(config), None, open_metrics_directory())
            target = str(cached_profile(vllm_config, config).absolute())
            return replace(settings, config=config, profile_to_build=target)
    return resolve(vllm_config, config, path, open_metrics_directory())


def without_profile(config: KVzipConfig) -> KVzipConfig:
    """The same settings without what needs a head profile, for an engine that has none."""
    from vllm_kvzip.scoring import available_scorers, scorer_class

    scorer, budget = config.scorer, config.budget
    if scorer in available_scorers():
        scorer = None if _needs_a_profile(scorer, scorer_class(scorer)) else scorer
    budget = None if budget in ("profile", "retrieval") else budget
    return config.model_copy(update={"scorer": scorer, "budget": budget})


def resolve(
    vllm_config: VllmConfig, config: KVzipConfig, path: Path | None, metrics_directory: str | None
) -> Settings:
    """Settings of an engine with a head profile, or without one.

    Args:
        vllm_config: of the engine.
        config: what the user asked for.
        path: of the profile.
        metrics_directory: see :class:`Settings`.

    Raises:
        KVzipError: with one sentence for the user.
    """
    from vllm_kvzip.scoring import scorer_class

    if path is None and config.profile == "auto" and config.scorer is None:
        logger.warning(
            "No head profile matches this model, so scorer %s chooses; build one with "
            "`vllm-kvzip profile` for better quality.",
            DEFAULT_SCORER,
        )
    else:
        logger.info("Head profile: %s", path or "none")
    scorer = config.scorer or _default_scorer(path)
    try:
        scorer_type = scorer_class(scorer)
    except ValueError as error:
        raise ConfigError(f"scorer: {error}") from error
    budget = config.budget or scorer_type.default_budget
    if budget is None:
        budget = "profile" if path else DEFAULT_BUDGET
    if path is None:
        _refuse_what_needs_a_profile(scorer, scorer_type, budget)
    for name in ("prefill_budget", "decode_budget"):
        if getattr(config, name) is not None:
            rescores = scorer_type.rescores_kept and config.mode == "evict"
            competes = scorer_type.comparable_across_parts or rescores
            check_budget_in_tokens(name, vllm_config, scorer, competes)
    curve = loss_curve(vllm_config, config, scorer, budget, path)
    repeats = scorer_type.needs_reconstruction
    is_capped = caps_logits(vllm_config.model_config.hf_text_config)
    check_capped_logits(is_capped, scorer)
    check_connector(vllm_config, config, repeats)
    if repeats:
        check_scoring_passes(vllm_config, scorer)
    surrogate = None
    if path is not None and scorer_type.needs_surrogate:
        surrogate = _surrogate_file(vllm_config, path)
    head_budgets, importance = _head_budgets(path, budget)
    settings = Settings(
        config=config,
        scorer=scorer,
        budget=budget,
        head_budgets=head_budgets,
        head_importance=importance,
        repeat_ids=repeat_ids(vllm_config, config, path) if repeats else None,
        surrogate=str(surrogate) if surrogate else None,
        surrogate_digest=hashlib.sha256(surrogate.read_bytes()).hexdigest() if surrogate else None,
        loss_curve=curve,
        metrics_directory=metrics_directory,
    )
    if path is not None and budget == "profile" and config.mode == "mixed":
        return replace(settings, head_tiers=_head_tiers(vllm_config, settings, path))
    return settings


def _head_tiers(vllm_config: VllmConfig, settings: Settings, path: Path) -> dict[str, Any] | None:
    """What a profile says of two tiers, when they are of this cache and the user says nothing."""
    tiers = load_profile(path).tiers
    shape = cache_shape(vllm_config)
    quantization = settings.quantization(*shape)
    if tiers is None or quantization is None or settings.config.full_share is not None:
        return None
    token_bytes = shape[0] / quantization.head_page_tokens
    if abs(token_bytes - tiers.token_bytes) > MOST_TIER_MISMATCH * tiers.token_bytes:
        logger.warning(
            "The head profile's tiers were made for quantized KV pairs of %.0f %% of their bytes, "
            "not %.0f %%, and are not used; build it again with `vllm-kvzip profile`.",
            100 * tiers.token_bytes,
            100 * token_bytes,
        )
        return None
    return {"full": tiers.full, "kept": tiers.kept, "shares": tiers.shares()}


def _refuse_what_needs_a_profile(scorer: str, scorer_type: type[Scorer], budget: Budget) -> None:
    """Called when there is no head profile."""
    needing = ["budget"] if budget in ("profile", "retrieval") else []
    needing += ["scorer"] if _needs_a_profile(scorer, scorer_type) else []
    for setting in needing:
        value = budget if setting == "budget" else scorer
        raise ConfigError(
            f"{setting} {value} needs a head profile, and none matches this model; build one with "
            f"`vllm-kvzip profile` or choose another {setting}."
        )


def _default_scorer(profile: Path | None) -> str:
    """The best scorer that costs next to nothing: trained networks, else none that need training.

    The head budgets of a profile are no reason to take scorer ``profile``: on the real test model
    they keep no more answers than chance does.
    """
    if profile is None:
        return DEFAULT_SCORER
    if profile.with_suffix(SURROGATE_SUFFIX).is_file():
        return "surrogate"
    logger.warning(
        "Head profile %s has no networks of scorer surrogate beside it, so scorer %s chooses; "
        "build it again with `vllm-kvzip profile` for better quality.",
        profile,
        DEFAULT_SCORER,
    )
    return DEFAULT_SCORER


def _needs_a_profile(scorer: str, scorer_type: type[Scorer]) -> bool:
    return scorer == "profile" or scorer_type.needs_surrogate


def _surrogate_file(vllm_config: VllmConfig, profile: Path) -> Path:
    """The trained networks beside a head profile, once they are known to fit."""
    from vllm_kvzip.head_profiles.networks import load_surrogate

    path = profile.with_suffix(SURROGATE_SUFFIX).absolute()
    load_surrogate(path, model_fingerprint(vllm_config))
    return path


def _head_budgets(
    path: Path | None, budget: Budget
) -> tuple[dict[str, list[list[float]]] | None, list[list[float]] | None]:
    """A profile's budgets and importance, as far as the budget looks at them."""
    if path is None or budget not in ("profile", "retrieval"):
        return None, None
    profile = load_profile(path)
    return profile.budgets if budget == "profile" else None, profile.importance


def repeat_ids(vllm_config: VllmConfig, config: KVzipConfig, path: Path | None) -> list[list[int]]:
    """Token ids of the repeat prompts; the wording that made the profile is known to work."""
    from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
    from vllm_kvzip.vllm_bridge.symbols import cached_tokenizer_from_config

    provenance = load_profile(path).provenance if path is not None else None
    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    try:
        wording = repeat_wording(config.repeat_prompt, provenance, tokenizer)
        return list(wording.token_ids(tokenizer))
    except ValueError as error:
        raise ConfigError(f"repeat_prompt {error}") from error


def profile_path(vllm_config: VllmConfig, config: KVzipConfig) -> Path | None:
    """The head profile of an engine, or None.

    Raises:
        ProfileError: if the one that the user named does not fit.
    """
    running = model_fingerprint(vllm_config)
    if config.profile in (None, "none"):
        return None
    if config.profile in ("auto", "build"):
        if found := find_profile(running, profile_folders()):
            return found
        from vllm_kvzip.head_profiles.profile_cache import is_usable

        built = cached_profile(vllm_config, config)
        return built if built.is_file() and is_usable(built, running) else None
    path = Path(str(config.profile)).expanduser()
    check_matches(load_profile(path), running, path)
    return path


def cached_profile(vllm_config: VllmConfig, config: KVzipConfig) -> Path:
    """Where an engine that built a profile of this model has put it."""
    from vllm_kvzip.head_profiles.profile_cache import cache_file, weight_files

    model = vllm_config.model_config
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(config.profile_cache or f"{user_cache}/vllm-kvzip").expanduser()
    details = {
        "config": model.hf_config.to_json_string(),
        "revision": [model.revision, getattr(model.hf_config, "_commit_hash", None)],
        "weights": weight_files(str(model.model)),
        "text": config.profile_text,
        "repeat_prompt": config.repeat_prompt,
    }
    return cache_file(folder, model_fingerprint(vllm_config), details)
