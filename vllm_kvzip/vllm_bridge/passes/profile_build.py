"""Worker side: an engine makes the head profile of its own model before it serves.

The model reads calibration contexts and repeats them; from what its heads look at follow their
importance, their budgets, and the networks of scorer ``surrogate``. With tensor parallelism all
ranks read, and the first learns from the heads of all. Whatever goes wrong, the engine serves, with
the scorer that needs no profile.
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.errors import ProfileError, UnsupportedError
from vllm_kvzip.head_profiles.calibration import (
    CONTEXT_TOKENS,
    KEEP_RATIOS,
    MIN_REPEATED_SHARE,
    NETWORK_TOKENS,
    NETWORK_WIDTH,
    NUM_CONTEXTS,
    calibration_contexts,
    default_material,
    read_material,
)
from vllm_kvzip.head_profiles.head_profile import HeadProfile, Provenance
from vllm_kvzip.head_profiles.network_training import SurrogateTrainer
from vllm_kvzip.head_profiles.profile_cache import build_lock, is_usable, store
from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
from vllm_kvzip.planning.reconstruction import RepeatRule, retrieval_fractions
from vllm_kvzip.vllm_bridge.cache.layer_checks import ATTENDS_OVER_HEAD_PAGES
from vllm_kvzip.vllm_bridge.fingerprint import model_fingerprint
from vllm_kvzip.vllm_bridge.passes.calibration_pass import CalibrationPass, CaughtCache
from vllm_kvzip.vllm_bridge.passes.model_rotary import find_rotary, num_positions
from vllm_kvzip.vllm_bridge.passes.ranks import Ranks
from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatPrompt
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.start.options import resolve, without_profile
from vllm_kvzip.vllm_bridge.symbols import Attention, get_layers_from_vllm_config, init_logger

if TYPE_CHECKING:
    from vllm_kvzip.config import KVzipConfig
    from vllm_kvzip.head_profiles.head_profile import ModelFingerprint
    from vllm_kvzip.head_profiles.networks import LayerSurrogate
    from vllm_kvzip.head_profiles.repeat_prompt import RepeatWording
    from vllm_kvzip.vllm_bridge.passes.scoring_pass import ScoreColumns
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

logger = init_logger("vllm." + __name__)

_own_folders: list[tempfile.TemporaryDirectory[str]] = []  # gone when the process ends


def settings_with_profile(
    vllm_config: VllmConfig, model: Any, score_columns: ScoreColumns
) -> Settings:
    """Make the head profile, or find that another process has made it, and settle the settings.

    Args:
        vllm_config: of the engine; its settings name the file.
        model: vLLM's, loaded.
        score_columns: see :class:`~vllm_kvzip.vllm_bridge.passes.scoring_pass.ScoringMetadata`.

    Returns:
        settings with the profile; those of an engine without one when there was no time, or
        anything failed.
    """
    given = Settings.from_vllm_config(vllm_config)
    config, ranks = given.config, Ranks()
    assert given.profile_to_build is not None
    path = Path(given.profile_to_build)
    deadline = time.monotonic() + config.profile_build_seconds
    try:
        path = _find_or_build(vllm_config, model, score_columns, path, deadline, ranks)
        settings = ranks.together(
            partial(resolve, vllm_config, config, path, given.metrics_directory)
        )
    except Exception as error:  # an engine without a profile is better than none
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        settings = resolve(vllm_config, without_profile(config), None, given.metrics_directory)
        if ranks.is_first:
            logger.warning(
                "No head profile could be built (%s), so scorer %s chooses; build one with "
                "`vllm-kvzip profile` for much better quality.",
                reason,
                settings.scorer,
            )
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return settings


def _find_or_build(
    vllm_config: VllmConfig,
    model: Any,
    score_columns: ScoreColumns,
    path: Path,
    deadline: float,
    ranks: Ranks,
) -> Path:
    """The file of the profile; in a folder of this process where the user's cannot be written."""
    fingerprint = model_fingerprint(vllm_config)
    with ExitStack() as stack:
        path, is_there = ranks.on_first(lambda: _claim(stack, path, fingerprint, deadline))
        if is_there:
            return path
        begin = time.monotonic()
        builder = _read_all(vllm_config, model, score_columns, deadline, ranks)
        ranks.on_first(lambda: store(path, *builder.finish()))
        if ranks.is_first:
            logger.info("Head profile %s was built in %.0f s.", path, time.monotonic() - begin)
    return path


def _claim(
    stack: ExitStack, path: Path, fingerprint: ModelFingerprint, deadline: float
) -> tuple[Path, bool]:
    """Where the profile is to lie, locked until ``stack`` is left, and whether it is there."""
    try:
        stack.enter_context(build_lock(path, deadline))
    except TimeoutError:
        raise
    except OSError as error:
        logger.warning(
            "The folder %s cannot be written (%s), so the head profile is built for this "
            "engine alone; name another folder with profile_cache.",
            path.parent,
            error.strerror,
        )
        _own_folders.append(tempfile.TemporaryDirectory(prefix="vllm-kvzip-"))
        path = Path(_own_folders[-1].name) / path.name
    if is_usable(path, fingerprint):
        logger.info("Another process has built the head profile %s.", path)
        return path, True
    logger.info(
        "Building a head profile of %s, once; %d contexts are read and repeated.",
        fingerprint.name,
        NUM_CONTEXTS,
    )
    return path, False


def _read_all(
    vllm_config: VllmConfig,
    model: Any,
    score_columns: ScoreColumns,
    deadline: float,
    ranks: Ranks,
) -> _Builder:
    """Let all ranks read and repeat the contexts; the first learns from the heads of all."""
    builder = ranks.together(lambda: _Builder(vllm_config, model, score_columns, deadline))
    num_kv_heads = vllm_config.model_config.get_total_num_kv_heads()
    for context in builder.contexts:
        with torch.no_grad():
            own = ranks.together(partial(builder.watch.score, context))
            scores = ranks.all_heads(own, 1, num_kv_heads)
            layers = [
                (ranks.all_heads(keys, 0, num_kv_heads), ranks.all_heads(values, 0, num_kv_heads))
                for _, (keys, values) in sorted(builder.cache.layers.items())
            ]
            ranks.on_first(partial(builder.take_in, layers, scores))
    return builder


class _Builder:
    """Collects what heads look at, context by context, and makes a profile of it.

    Attributes:
        contexts: token ids of each.
        watch: reads and repeats a context.
        cache: keys and values of the context that was read last, of this rank's heads.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: Any, score_columns: ScoreColumns, deadline: float
    ) -> None:
        from vllm_kvzip.vllm_bridge.symbols import cached_tokenizer_from_config

        self._vllm_config, self._deadline = vllm_config, deadline
        self._config = config = Settings.from_vllm_config(vllm_config).config
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self._wording = wording = repeat_wording(config.repeat_prompt, None, tokenizer)
        text = config.profile_text
        self._material = (
            default_material() if text is None else read_material([Path(text).expanduser()])
        )
        longest = vllm_config.scheduler_config.max_num_batched_tokens
        self._tokens = min(CONTEXT_TOKENS, longest, vllm_config.model_config.max_model_len // 2)
        self.contexts = calibration_contexts(tokenizer, self._material, NUM_CONTEXTS, self._tokens)
        layer_names = list(_layers_and_windows(vllm_config)[0])
        rotary = find_rotary(model, layer_names, vllm_config.model_config.hf_text_config)
        if any(tables is not rotary[0] for tables in rotary):
            raise UnsupportedError("its layers have different rotary embeddings")
        self._rotary = rotary[0]
        self.watch, self.cache = _calibration_pass(
            vllm_config, model, score_columns, config, wording, tokenizer
        )
        self._trainer = SurrogateTrainer(len(layer_names), NETWORK_TOKENS, NETWORK_WIDTH, seed=0)
        self._importance: torch.Tensor | None = None
        self._num_read = 0

    def take_in(
        self, layers: list[tuple[torch.Tensor, torch.Tensor]], scores: torch.Tensor
    ) -> None:
        """Learn from one context.

        Args:
            layers: keys and values ``[H, T, D]`` of all KV heads, by layer.
            scores: float32 ``[L, H, T]``.

        Raises:
            ProfileError: if the scores are none.
            TimeoutError: if it has taken too long.
        """
        if not bool((scores.flatten(1).amax(dim=1) > 0).all()):  # never asked, or NaN
            raise ProfileError("some layers show no attention, or it is not a number")
        self._trainer.add(layers, [scores], self._rotary)
        means = scores.mean(dim=-1).double() / len(self.contexts)
        self._importance = means if self._importance is None else self._importance + means
        self._check_time()
        self._num_read += 1
        logger.info("Head profile: %d of %d contexts.", self._num_read, len(self.contexts))

    def finish(self) -> tuple[HeadProfile, list[LayerSurrogate]]:
        """The profile and its networks, once all contexts have been taken in.

        Raises:
            ProfileError: if the model did not repeat the contexts.
            TimeoutError: if it has taken too long.
        """
        repeated_share = self.watch.repeated_share
        if repeated_share < MIN_REPEATED_SHARE:
            raise ProfileError(
                f"the model repeats only {repeated_share:.0%} of the calibration text; try "
                f"another profile_text or repeat_prompt"
            )
        layers = self._trainer.fit(self._check_time)
        logger.info("Head profile: trained the networks of %d layers.", len(layers))
        assert self._importance is not None
        importance = self._importance.clamp(0, 1).cpu()
        budgets = {ratio: retrieval_fractions(importance, ratio) for ratio in KEEP_RATIOS}
        profile = HeadProfile(
            schema_version=1,
            model=model_fingerprint(self._vllm_config),
            provenance=Provenance(
                method="kvzip reconstruction inside vLLM, budgets by heads",
                repeat_prompt=self._wording.first,
                later_repeat_prompt=self._wording.later,
                scoring_chunk_tokens=self._config.scoring_chunk_tokens,
                num_contexts=len(self.contexts),
                context_tokens=self._tokens,
                repeated_share=round(repeated_share, 3),
                texts=[part.label for part in self._material],
                versions={"torch": torch.__version__, "vllm-kvzip": version("vllm-kvzip")},
                created=date.today().isoformat(),
            ),
            importance=importance.tolist(),
            budgets={str(ratio): grid.clamp(0, 1).tolist() for ratio, grid in budgets.items()},
        )
        return profile, [layer.to(torch.device("cpu")) for layer in layers]

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            seconds = self._config.profile_build_seconds
            raise TimeoutError(f"it took longer than profile_build_seconds={seconds:g}")


def _calibration_pass(
    vllm_config: VllmConfig,
    model: Any,
    score_columns: ScoreColumns,
    config: KVzipConfig,
    wording: RepeatWording,
    tokenizer: Any,
) -> tuple[CalibrationPass, CaughtCache]:
    """What runs the model over contexts, and where their keys and values can be read."""
    attention, windows = _layers_and_windows(vllm_config)
    first = next(iter(attention.values()))
    geometry = CacheGeometry(
        num_layers=len(attention),
        num_kv_heads=first.num_kv_heads,
        group_size=first.num_heads // first.num_kv_heads,
        head_dim=first.head_size,
        block_size=1,
    )
    layer_index = {name: index for index, name in enumerate(attention)}
    repeat = RepeatPrompt(*map(tuple, wording.token_ids(tokenizer)))
    max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    max_positions = num_positions(model, vllm_config.model_config)
    cache = CaughtCache(geometry, layer_index, next(model.parameters()).device, windows)
    watch = CalibrationPass(
        model=model,
        vllm_config=vllm_config,
        cache=cache,
        repeat=repeat,
        rule=RepeatRule.fitting(
            config.scoring_chunk_tokens,
            min(max_tokens, max_positions),
            len(repeat.first),
            len(repeat.later),
        ),
        num_sinks=config.sink_tokens,
        max_tokens=max_tokens,
        max_positions=max_positions,
        score_columns=score_columns,
        windows=cache if windows else None,
        skip_compiled=True,
    )
    return watch, cache


def _layers_and_windows(vllm_config: VllmConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """vLLM's attention layers that a profile is for, and the windows of the others, by name.

    Raises:
        UnsupportedError: if these are not the layers that are compressed, or one of them has an
            attention that knows nothing of our passes.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    longest = vllm_config.model_config.max_model_len
    windows = {
        name: layer.sliding_window
        for name, layer in layers.items()
        if layer.sliding_window is not None and layer.sliding_window < longest
    }
    full = {name: layer for name, layer in layers.items() if name not in windows}
    wanted = model_fingerprint(vllm_config).num_layers
    if len(full) != wanted:
        raise UnsupportedError(f"{len(full)} of its layers attend to all tokens, not {wanted}")
    for name, layer in layers.items():
        if not getattr(layer.impl, ATTENDS_OVER_HEAD_PAGES, False):
            raise UnsupportedError(f"layer {name} has an attention of its own")
    return full, windows
