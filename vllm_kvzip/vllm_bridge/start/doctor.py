"""What ``vllm serve`` would do with a model and some flags, without loading or serving anything.

The configuration is made by vLLM and by the same checks as at start-up. What a KV cache holds is
computed from it; only an engine can say how much memory is left for one.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_kvzip.config import METHOD
from vllm_kvzip.errors import KVzipError
from vllm_kvzip.model.attention_kinds import (
    FULL_KINDS,
    SLIDING_KIND,
    caps_logits,
    has_sinks,
    layers_by_kind,
    sliding_window,
)
from vllm_kvzip.model.cache_shares import compressed_share
from vllm_kvzip.vllm_bridge.drafts import rule_with_drafts
from vllm_kvzip.vllm_bridge.fingerprint import compressed_layers, model_fingerprint
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.settings import Settings, cache_shape
from vllm_kvzip.vllm_bridge.start.cache_plan import CachePlan, plan_cache
from vllm_kvzip.vllm_bridge.start.options import profile_path
from vllm_kvzip.vllm_bridge.start.plugin import register
from vllm_kvzip.vllm_bridge.symbols import (
    AsyncEngineArgs,
    FlexibleArgumentParser,
    UsageContext,
    make_arg_parser,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_kvzip.planning.prefix_rule import PrefixRule

USUAL_LENGTHS = (1024, 4096, 16384, 65536)
SHARE_LENGTHS = (8192, 32768, 131072)
OUR_LOGGERS = ("vllm.vllm_kvzip", "vllm_kvzip")


@dataclass(frozen=True)
class Compression:
    """What is compressed, and how.

    Attributes:
        architecture: of the model.
        num_layers, num_attention_layers: all, and those that are compressed.
        compressed_layers: indices of these among all layers; None: the model has one kind only.
        left_alone: the other layers by kind, one of transformers' names.
        window: tokens that those with a sliding window look back on; None: there are none.
        shares: bytes of the compressed layers / of all layers, in the KV cache of one request, by
            its length in tokens.
        num_kv_heads, head_size: of each of these, over all ranks.
        attention: their kind.
        num_ranks: tensor-parallel processes.
        num_stages: pipeline stages, each of which has so many processes.
        profile: path of the head profile; None: there is none.
        builds_profile: whether the engine makes it first.
        scorer, budget, mode: what is used, where the user left it open.
        keep_ratio: kept / all; with a quality loss the most.
        quality_loss: nats a token that compressing a prompt may cost; None: the ratio decides.
        counts: what the ratio counts, ``KV pairs`` or ``bytes``.
        prefill_budget, decode_budget: tokens that a request holds between rounds while its prompt
            is read, and while its answer is generated; None: there are no rounds.
        block_size: tokens per block.
        pages_per_head: head pages of a KV head in a block.
        cache_dtype: of the KV cache.
        max_model_len: tokens of the longest request.
    """

    architecture: str
    num_layers: int
    num_attention_layers: int
    compressed_layers: list[int] | None
    left_alone: dict[str, int]
    window: int | None
    shares: dict[int, float]
    num_kv_heads: int
    head_size: int
    attention: str
    num_ranks: int
    num_stages: int
    profile: str | None
    builds_profile: bool
    scorer: str
    budget: str
    mode: str
    keep_ratio: float
    quality_loss: float | None
    counts: str
    prefill_budget: int | None
    decode_budget: int | None
    block_size: int
    pages_per_head: int
    cache_dtype: str
    max_model_len: int


@dataclass(frozen=True)
class Room:
    """What a KV cache holds of prompts of one length, while their answers begin.

    Attributes:
        prompt_tokens: length of each.
        left_alone: why they are not compressed, one of ``metrics.SKIP_REASONS``; None: they are.
        blocks, blocks_compressed: of one prompt, in all KV cache groups.
        blocks_left_alone: how many of either are of layers that are not compressed.
        tokens, tokens_compressed: of as many whole prompts as there is room for.
    """

    prompt_tokens: int
    left_alone: str | None
    blocks: int
    blocks_compressed: int
    blocks_left_alone: int
    tokens: int
    tokens_compressed: int


@dataclass(frozen=True)
class Diagnosis:
    """Whether it starts, and with what.

    Attributes:
        refusal: why it does not start, in one sentence; None: it does.
        warnings: what start-up warns about, and prompts that are left alone.
        compression: None where it does not start.
        cache_blocks: of a KV cache of the stated size.
        rooms: one a length of prompts.
    """

    refusal: str | None = None
    warnings: list[str] = field(default_factory=list)
    compression: Compression | None = None
    cache_blocks: int = 0
    rooms: list[Room] = field(default_factory=list)


def diagnose(
    arguments: list[str], memory_gib: float = 1.0, lengths: Sequence[int] | None = None
) -> Diagnosis:
    """Make the configuration that ``vllm serve`` would run with, and look at it.

    Args:
        arguments: of ``vllm serve``, the model as ``--model``. Compression is on.
        memory_gib: size of the KV cache on each rank.
        lengths: of prompts in tokens; None: usual ones that the model takes.

    Raises:
        SystemExit: if vLLM does not know a flag; its parser has said so.
    """
    register()
    parsed = make_arg_parser(FlexibleArgumentParser("vllm serve")).parse_args(arguments)
    parsed.kv_compression = METHOD
    with _our_warnings() as warnings:
        try:
            engine_args = AsyncEngineArgs.from_cli_args(parsed)
            engine_args.kvzip_raises = True
            made = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
            plan = plan_cache(made)
            compression = _compression(plan)
            rule = Settings.from_vllm_config(made).rule(*cache_shape(plan.vllm_config))
            rule = rule_with_drafts(rule, made)
        except KVzipError as error:
            return Diagnosis(str(error), warnings)
        except Exception as error:  # whatever vLLM says of a model or a flag
            return Diagnosis(f"vLLM refuses it: {_sentence(error)}", warnings)
    cache_blocks = max(0, int(memory_gib * 2**30) // plan.block_bytes - 1)  # vLLM's null block
    rule = replace(rule, pool_blocks=plan.pool_blocks(cache_blocks + 1))
    limit = compression.max_model_len
    usual = [length for length in USUAL_LENGTHS if length < limit] or [limit - 1]
    rooms = [_room(rule, plan, length, cache_blocks) for length in lengths or usual]
    for room in rooms:
        if room.left_alone is not None:
            warnings.append(
                f"Prompts of {room.prompt_tokens} tokens are left alone: {room.left_alone}."
            )
    return Diagnosis(None, warnings, compression, cache_blocks, rooms)


def _compression(plan: CachePlan) -> Compression:
    vllm_config = plan.vllm_config
    settings = Settings.from_vllm_config(vllm_config)
    config, model = settings.config, vllm_config.model_config
    shape = model_fingerprint(vllm_config)
    text_config: Any = model.hf_text_config
    profile: Any = settings.profile_to_build or profile_path(vllm_config, config)
    dtype = running_cache_dtype(vllm_config)
    layers = compressed_layers(vllm_config)
    left_alone = {} if layers is None else _left_alone(text_config, len(layers))
    lengths = sorted({min(length, model.max_model_len) for length in SHARE_LENGTHS})
    return Compression(
        architecture=shape.architecture,
        num_layers=getattr(text_config, "num_hidden_layers", shape.num_layers),
        num_attention_layers=shape.num_layers,
        compressed_layers=layers,
        left_alone=left_alone,
        window=sliding_window(text_config) if SLIDING_KIND in left_alone else None,
        shares={
            length: compressed_share(shape.num_layers, plan.others, length, plan.block_size)
            for length in lengths
        },
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_dim,
        attention=_attention(text_config, SLIDING_KIND in left_alone),
        num_ranks=vllm_config.parallel_config.tensor_parallel_size,
        num_stages=vllm_config.parallel_config.pipeline_parallel_size,
        profile=None if profile is None else str(profile),
        builds_profile=settings.profile_to_build is not None,
        scorer=settings.scorer,
        budget=settings.budget,
        mode=config.mode,
        keep_ratio=config.ratio,
        quality_loss=config.quality_loss,
        prefill_budget=config.prefill_budget,
        decode_budget=config.decode_budget,
        counts="KV pairs" if config.keep_bytes_ratio is None else "bytes",
        block_size=plan.block_size,
        pages_per_head=running_platform().pages_per_head(plan.block_size),
        cache_dtype=str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        max_model_len=model.max_model_len,
    )


def _left_alone(text_config: Any, num_compressed: int) -> dict[str, int]:
    """Layers that are not compressed, by kind."""
    kinds = layers_by_kind(text_config)
    found = {kind: number for kind, number in kinds.items() if kind not in FULL_KINDS}
    if num_compressed > sum(kinds.values()) - sum(found.values()):  # the window holds everything
        found.pop(SLIDING_KIND)
    return found


def _attention(text_config: Any, slides: bool) -> str:
    """The kind of the layers that are compressed."""
    window = None if slides else sliding_window(text_config)
    parts = ["full attention"]
    parts += [f"a window of {window} tokens that holds everything"] if window else []
    parts += ["capped logits"] if caps_logits(text_config) else []
    parts += ["learned sinks"] if has_sinks(text_config) else []
    return ", ".join(parts)


def _room(rule: PrefixRule, cache: CachePlan, length: int, cache_blocks: int) -> Room:
    blocks = compressed = -(-length // rule.block_size)
    if plan := rule.plan(length):
        tail = -(-(length - plan.boundary_tokens) // rule.block_size)
        compressed = plan.num_compressed_blocks + tail
    others = cache.blocks_of_others(length)
    return Room(
        prompt_tokens=length,
        left_alone=rule.skip_reason(length),
        blocks=blocks + others,
        blocks_compressed=compressed + others,
        blocks_left_alone=others,
        tokens=cache_blocks // (blocks + others) * length,
        tokens_compressed=cache_blocks // (compressed + others) * length,
    )


def _sentence(error: Exception) -> str:
    """The first line of what vLLM says, without pydantic's frame around it."""
    said = str(error)
    if isinstance(error, ValidationError):
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
    lines = said.strip().splitlines() or [type(error).__name__]
    return lines[0]


@contextmanager
def _our_warnings() -> Iterator[list[str]]:
    """Warnings of the plugin, each once, in place of its log."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (said := record.getMessage()) not in found:
                found.append(said)

    handler = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in OUR_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield found
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
