"""Worker side: the runtime of one worker, put together once vLLM has allocated the KV cache.

:func:`assemble_runtime` makes one part after the other, each from those before it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_kvzip.budgeting.quality import LossCurve, QualityTarget
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.model.key_transform import num_first
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.scoring import ScorerSettings, create_scorer
from vllm_kvzip.vllm_bridge.attention.attention_timer import AttentionTimer
from vllm_kvzip.vllm_bridge.attention.draft_layers import DraftDescriber, draft_builders
from vllm_kvzip.vllm_bridge.attention.metadata_builder import HeadPageBuilder
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.cache.cache_view import map_head_pages
from vllm_kvzip.vllm_bridge.cache.compressed_layers import CompressedLayers
from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_capped_logits
from vllm_kvzip.vllm_bridge.cache.unclean_blocks import UncleanBlocks
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.contexts.kept_records import KeptRecords
from vllm_kvzip.vllm_bridge.fingerprint import rows_of_stages
from vllm_kvzip.vllm_bridge.fp8_cache import read_scales
from vllm_kvzip.vllm_bridge.outcomes import WorkerOutcomes
from vllm_kvzip.vllm_bridge.parallelism import first_kv_head
from vllm_kvzip.vllm_bridge.passes.model_rotary import find_rotary, num_positions
from vllm_kvzip.vllm_bridge.passes.scoring_pass import ReconstructionPass, RepeatPrompt
from vllm_kvzip.vllm_bridge.passes.window_caches import find_windows
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder
from vllm_kvzip.vllm_bridge.symbols import (
    Attention,
    get_layers_from_vllm_config,
    get_pp_group,
    get_tensor_model_parallel_rank,
    init_logger,
)
from vllm_kvzip.vllm_bridge.worker.compression import PrefixCompression
from vllm_kvzip.vllm_bridge.worker.context_pages import ContextPages
from vllm_kvzip.vllm_bridge.worker.head_page_runtime import HeadPageRuntime
from vllm_kvzip.vllm_bridge.worker.observation import QueryObservation
from vllm_kvzip.vllm_bridge.worker.prefixes import WorkerPrefixes
from vllm_kvzip.vllm_bridge.worker.repeats import Repeats
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker
from vllm_kvzip.vllm_bridge.worker.runners import adapt

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvzip.model.rotary import RotaryTables
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.scoring import Scorer
    from vllm_kvzip.vllm_bridge.settings import Settings
    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig
    from vllm_kvzip.vllm_bridge.worker.worker import HeadPageWorker

logger = init_logger("vllm." + __name__)

SCORER_WITHOUT_ROTARY = "keydiff"  # where the default scorer finds no rotary embedding


def assemble_runtime(worker: HeadPageWorker, kv_cache_config: KVCacheConfig) -> HeadPageRuntime:
    """The runtime of a worker whose model is loaded and whose cache is allocated.

    Args:
        worker: ours.
        kv_cache_config: vLLM's placement of the layers.

    Raises:
        UnsupportedError: if vLLM made something that cannot be compressed.
    """
    settings = worker.kvzip_settings
    layers = find_layers(worker, kv_cache_config)
    cache = view_cache(worker, kv_cache_config, layers)
    room = layers.group.share_of_pool(kv_cache_config, worker.vllm_config)
    rule = replace(layers.spec.rule, pool_blocks=room)
    scorer, rotary = make_scorer(worker, layers)
    compressor = make_compressor(worker, layers, cache, rule, scorer, rotary)
    repeats = make_repeats(worker, kv_cache_config, layers, cache)
    recorder, timer = make_recorder(worker)
    prefixes = WorkerPrefixes(settings.config.reuse_ttl_seconds)
    scored = replace(cache.geometry, num_layers=len(layers.names))
    observation = QueryObservation(
        scored, cache.layer_index, settings.observation_tokens, scorer.observes_rounds_only
    )
    unclean = UncleanBlocks(cache)
    block_bytes = cache.geometry.pages_per_block * cache.pages[0].nbytes
    records = KeptRecords(layers.numbers, block_bytes, scorer.name)
    compression = PrefixCompression(
        compressor=compressor,
        scale=layers.first.impl.scale,
        prefixes=prefixes,
        observation=observation,
        repeats=repeats,
        unclean=unclean,
        outcomes=WorkerOutcomes(cache.pages.device),
        recorder=recorder,
        records=records,
    )
    drafting = draft_builders(worker.model_runner) if layers.num_drafts else []
    runtime = HeadPageRuntime(
        cache=cache,
        tracker=RequestTracker(rule, layers.group, repeats=repeats is not None),
        rows=adapt(worker.model_runner, layers.group),
        batcher=worker.attach(cache, [*layers.builders, *drafting]),
        prefixes=prefixes,
        observation=observation,
        compression=compression,
        unclean=unclean,
        timer=timer,
        contexts=ContextPages(cache, prefixes, unclean),
        records=records,
    )
    for builder in layers.builders:
        builder.describer = runtime
    for builder in drafting:
        builder.describer = DraftDescriber(prefixes.states, runtime.split)
    for name in layers.names:
        layers.by_name[name].impl.timer = timer
    logger.info(
        "KV compression is on: mode %s, keep ratio %s, scorer %s, budget %s, prompts from %d "
        "tokens.",
        settings.config.mode,
        settings.config.ratio,
        scorer.name,
        settings.budget,
        settings.config.min_prompt_tokens,
    )
    return runtime


def find_layers(worker: HeadPageWorker, kv_cache_config: KVCacheConfig) -> CompressedLayers:
    """Layers, their metadata builders, and which of the KV heads this rank has.

    Raises:
        UnsupportedError: if vLLM chose another kind of cache or of attention.
    """
    group = CompressedGroup.find(kv_cache_config, HeadPageSpec)
    spec = kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec
    builders = [
        builder
        for attn_group in worker.model_runner.attn_groups[group.group_id]
        for builder in attn_group.metadata_builders
    ]
    if not builders or not all(isinstance(b, HeadPageBuilder) for b in builders):
        wanted = " or ".join(place.name for place in worker.backends)
        raise UnsupportedError(
            f"KV compression is on, but vLLM chose another attention backend than {wanted}; "
            f"remove --attention-backend."
        )
    heads_before = first_kv_head(
        get_tensor_model_parallel_rank(),
        worker.parallel_config.tensor_parallel_size,
        worker.model_config.get_total_num_kv_heads(),
    )
    num_drafts = spec.rule.num_dense_layers
    rows, num_rows = _own_rows(worker, group.num_layers - num_drafts)
    return CompressedLayers(
        group=group,
        spec=spec,
        by_name=get_layers_from_vllm_config(worker.vllm_config, Attention, group.layer_names),
        builders=builders,
        heads=slice(heads_before, heads_before + spec.num_kv_heads),
        rows=rows,
        num_rows=num_rows,
        num_drafts=num_drafts,
    )


def _own_rows(worker: HeadPageWorker, num_layers: int) -> tuple[slice, int]:
    """This stage's layers among the compressed ones of all stages, and how many these are.

    Args:
        worker: ours.
        num_layers: that vLLM gave this stage to compress.

    Raises:
        UnsupportedError: if vLLM gave this stage other layers than its configuration says.
    """
    stages = rows_of_stages(worker.vllm_config)
    if len(stages) == 1:
        return slice(0, num_layers), num_layers
    rows = stages[get_pp_group().rank_in_group]
    if rows.stop - rows.start != num_layers:
        raise UnsupportedError(
            f"KV compression expects {rows.stop - rows.start} layers on this pipeline stage, but "
            f"vLLM made {num_layers}; set --pipeline-parallel-size to 1."
        )
    return rows, stages[-1].stop


def view_cache(
    worker: HeadPageWorker, kv_cache_config: KVCacheConfig, layers: CompressedLayers
) -> HeadPageCache:
    """vLLM's cache as a pool of head pages, and what reads and compacts them.

    Raises:
        UnsupportedError: if the cache is not laid out page by page.
    """
    settings, spec = worker.kvzip_settings, layers.spec
    config = settings.config
    pages_per_head = running_platform().pages_per_head(spec.block_size)
    pages, pool = map_head_pages(
        kv_cache_config,
        layers.group,
        spec,
        [layer.kv_cache for layer in layers.by_name.values()],
        worker.cache_config.get_resolved_kv_cache_layout(),
        pages_per_head,
    )
    check_capped_logits(bool(layers.first.impl.logits_soft_cap), settings.scorer)
    quantization = settings.quantization(spec.block_size, spec.head_size, spec.dtype.itemsize)
    attention_layers = list(layers.by_name.values())
    scales = read_scales(attention_layers, spec.num_kv_heads, worker.model_config.dtype)
    geometry = CacheGeometry(
        num_layers=layers.group.num_layers,
        num_kv_heads=spec.num_kv_heads,
        group_size=layers.first.num_heads // spec.num_kv_heads,
        head_dim=spec.head_size,
        block_size=spec.block_size,
        pages_per_head=pages_per_head,
    )
    return HeadPageCache(
        geometry=geometry,
        pool=pool,
        pages=pages,
        store=worker.page_store(pages, geometry, layers.builders, quantization, scales),
        layer_index={name: index for index, name in enumerate(layers.group.layer_names)},
        quantization=quantization,
        scales=scales,
        num_first=num_first(config.sink_tokens),
    )


def make_scorer(
    worker: HeadPageWorker, layers: CompressedLayers
) -> tuple[Scorer, list[RotaryTables | None] | None]:
    """The scorer, and each layer's rotary angles where it wants them.

    Raises:
        UnsupportedError: if the scorer that the user asked for finds no rotary embedding.
    """
    settings = worker.kvzip_settings
    config = settings.config
    wanted = ScorerSettings(
        config.observation_window_tokens, settings.surrogate, first_kv_head=layers.heads.start
    )
    scorer = create_scorer(settings.scorer, wanted)
    if not scorer.needs_rotary:
        return scorer, None
    model, text_config = worker.model_runner.get_model(), worker.model_config.hf_text_config
    try:
        return scorer, find_rotary(model, layers.names, text_config)
    except UnsupportedError:
        if config.scorer is not None or config.quality_loss is not None:
            raise
    scorer = create_scorer(SCORER_WITHOUT_ROTARY)
    logger.warning(
        "The rotary embedding of this model was not found, so scorer %s chooses, at lower quality "
        "than %s.",
        scorer.name,
        settings.scorer,
    )
    return scorer, None


def make_compressor(
    worker: HeadPageWorker,
    layers: CompressedLayers,
    cache: HeadPageCache,
    rule: PrefixRule,
    scorer: Scorer,
    rotary: list[RotaryTables | None] | None,
) -> Compressor:
    """What compresses one prompt, with this worker's part of the budgets by head."""
    settings = worker.kvzip_settings
    return Compressor(
        geometry=cache.geometry,
        pool=cache.pool,
        store=cache.store,
        rule=rule,
        scorer=scorer,
        budget=settings.budget,
        head_fractions=_own_fractions(settings, layers),
        head_importance=layers.part_of(settings.head_importance),
        tier_fractions=_own_tiers(settings, layers),
        rotary=rotary,
        soft_cap=layers.first.impl.logits_soft_cap,
        sink_logits=[layers.by_name[name].impl.sinks for name in layers.names],
        seed=settings.config.seed,
        clock=worker.clock,
        first_layer=layers.rows.start,
        layers_of_model=layers.num_rows,
        num_dense_layers=layers.num_drafts,
        quality=_quality_target(worker, cache),
    )


def _quality_target(worker: HeadPageWorker, cache: HeadPageCache) -> QualityTarget | None:
    """What chooses how many blocks a prompt needs; None where the keep ratio says it."""
    curve = worker.kvzip_settings.loss_curve
    if curve is None:
        return None
    points = tuple((worth, nats) for worth, nats in curve["points"])
    num_ranks = worker.parallel_config.tensor_parallel_size
    return QualityTarget(LossCurve(curve["power"], points), cache.geometry, num_ranks)


def make_repeats(
    worker: HeadPageWorker,
    kv_cache_config: KVCacheConfig,
    layers: CompressedLayers,
    cache: HeadPageCache,
) -> Repeats | None:
    """What lets the model repeat contexts; None where the scorer does not ask for it.

    Raises:
        UnsupportedError: if the cache of layers with a sliding window is not laid out page by page.
    """
    settings, vllm_config = worker.kvzip_settings, worker.vllm_config
    repeat_rule = settings.repeat_rule(vllm_config)
    if repeat_rule is None:
        return None
    assert settings.repeat_ids is not None
    model = worker.model_runner.get_model()
    windows = find_windows(worker, kv_cache_config, layers.group)
    reconstruction = ReconstructionPass(
        model=model,
        vllm_config=vllm_config,
        cache=cache,
        repeat=RepeatPrompt(*map(tuple, settings.repeat_ids)),
        rule=repeat_rule,
        num_sinks=settings.config.sink_tokens,
        max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_positions=num_positions(model, worker.model_config),
        score_columns=worker.score_columns,
        windows=windows,
    )
    num_ranks = worker.parallel_config.tensor_parallel_size
    return Repeats(reconstruction, worker.clock, num_ranks, windows)


def make_recorder(worker: HeadPageWorker) -> tuple[WorkerRecorder | None, AttentionTimer | None]:
    """Metrics and the timer of attention, on the first rank of the first pipeline stage.

    The other ranks would record the same, and the other stages the like for layers of their own.
    """
    if get_tensor_model_parallel_rank() != 0 or not get_pp_group().is_first_rank:
        return None, None
    recorder = WorkerRecorder(worker.kvzip_settings.metrics_directory)
    return recorder, AttentionTimer(recorder, worker.clock)


def _own_fractions(
    settings: Settings, own: CompressedLayers
) -> Callable[[float], list[list[float]]] | None:
    """Keep ratio -> share of its KV pairs each of this worker's heads keeps, if they differ."""
    if settings.head_importance is None:
        return None

    @functools.lru_cache(maxsize=64)
    def at(keep_ratio: float) -> list[list[float]]:
        fractions = own.part_of(settings.head_fractions(keep_ratio))
        assert fractions is not None
        return fractions

    return at


def _own_tiers(
    settings: Settings, own: CompressedLayers
) -> Callable[[float], tuple[list[list[float]], list[list[float]]]] | None:
    """The same of either tier, by bytes ratio."""
    if settings.head_tiers is None:
        return None

    @functools.lru_cache(maxsize=64)
    def at(bytes_ratio: float) -> tuple[list[list[float]], list[list[float]]]:
        full, kept = map(own.part_of, settings.tier_fractions(bytes_ratio))
        assert full is not None and kept is not None
        return full, kept

    return at
