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
from vllm_kvzip.model.attention_kinds import caps_logits, has_sinks, sliding_window
from vllm_kvzip.vllm_bridge.fingerprint import model_fingerprint
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.settings import Settings, cache_shape
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
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

USUAL_LENGTHS = (1024, 4096, 16384, 65536)
OUR_LOGGERS = ("vllm.vllm_kvzip", "vllm_kvzip")


@dataclass(frozen=True)
class Compression:
    """What is compressed, and how.

    Attributes:
        architecture: of the model.
        num_layers, num_attention_layers: all, and those that are compressed.
        num_kv_heads, head_size: of each of these, over all ranks.
        attention: their kind.
        num_ranks: tensor-parallel processes.
        profile: path of the head profile; None: there is none.
        builds_profile: whether the engine makes it first.
        scorer, budget, mode: what is used, where the user left it open.
        keep_ratio: kept / all.
        counts: what the ratio counts, ``KV pairs`` or ``bytes``.
        block_size: tokens per block.
        cache_dtype: of the KV cache.
        max_model_len: tokens of the longest request.
    """

    architecture: str
    num_layers: int
    num_attention_layers: int
    num_kv_heads: int
    head_size: int
    attention: str
    num_ranks: int
    profile: str | None
    builds_profile: bool
    scorer: str
    budget: str
    mode: str
    keep_ratio: float
    counts: str
    block_size: int
    cache_dtype: str
    max_model_len: int


@dataclass(frozen=True)
class Room:
    """What a KV cache holds of prompts of one length, while their answers begin.

    Attributes:
        prompt_tokens: length of each.
        left_alone: why they are not compressed, one of ``metrics.SKIP_REASONS``; None: they are.
        blocks, blocks_compressed: of one prompt.
        tokens, tokens_compressed: of as many whole prompts as there is room for.
    """

    prompt_tokens: int
    left_alone: str | None
    blocks: int
    blocks_compressed: int
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
            compression = _compression(made)
            rule = Settings.from_vllm_config(made).rule(*cache_shape(made))
        except KVzipError as error:
            return Diagnosis(str(error), warnings)
        except Exception as error:  # whatever vLLM says of a model or a flag
            return Diagnosis(f"vLLM refuses it: {_sentence(error)}", warnings)
    cache_blocks = max(0, int(memory_gib * 2**30) // _block_bytes(made) - 1)  # vLLM's null block
    rule = replace(rule, pool_blocks=cache_blocks + 1)
    limit = compression.max_model_len
    usual = [length for length in USUAL_LENGTHS if length < limit] or [limit - 1]
    rooms = [_room(rule, length, cache_blocks) for length in lengths or usual]
    for room in rooms:
        if room.left_alone is not None:
            warnings.append(
                f"Prompts of {room.prompt_tokens} tokens are left alone: {room.left_alone}."
            )
    return Diagnosis(None, warnings, compression, cache_blocks, rooms)


def _compression(vllm_config: VllmConfig) -> Compression:
    settings = Settings.from_vllm_config(vllm_config)
    config, model = settings.config, vllm_config.model_config
    shape = model_fingerprint(vllm_config)
    text_config: Any = model.hf_text_config
    profile: Any = settings.profile_to_build or profile_path(vllm_config, config)
    dtype = running_cache_dtype(vllm_config)
    return Compression(
        architecture=shape.architecture,
        num_layers=getattr(text_config, "num_hidden_layers", shape.num_layers),
        num_attention_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_dim,
        attention=_attention(text_config),
        num_ranks=vllm_config.parallel_config.tensor_parallel_size,
        profile=None if profile is None else str(profile),
        builds_profile=settings.profile_to_build is not None,
        scorer=settings.scorer,
        budget=settings.budget,
        mode=config.mode,
        keep_ratio=config.ratio,
        counts="KV pairs" if config.keep_bytes_ratio is None else "bytes",
        block_size=vllm_config.cache_config.block_size,
        cache_dtype=str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        max_model_len=model.max_model_len,
    )


def _attention(text_config: Any) -> str:
    """The kind of the layers that passed the checks."""
    window = sliding_window(text_config)
    parts = ["full attention"]
    parts += [f"a window of {window} tokens that holds everything"] if window else []
    parts += ["capped logits"] if caps_logits(text_config) else []
    parts += ["learned sinks"] if has_sinks(text_config) else []
    return ", ".join(parts)


def _block_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of one block on one rank."""
    block_size, head_size, itemsize = cache_shape(vllm_config)
    num_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    layers = model_fingerprint(vllm_config).num_layers
    return int(2 * block_size * head_size * itemsize * num_heads * layers)


def _room(rule: PrefixRule, length: int, cache_blocks: int) -> Room:
    blocks = compressed = -(-length // rule.block_size)
    if plan := rule.plan(length):
        tail = -(-(length - plan.boundary_tokens) // rule.block_size)
        compressed = plan.num_compressed_blocks + tail
    return Room(
        prompt_tokens=length,
        left_alone=rule.skip_reason(length),
        blocks=blocks,
        blocks_compressed=compressed,
        tokens=cache_blocks // blocks * length,
        tokens_compressed=cache_blocks // compressed * length,
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
