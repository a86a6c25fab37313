"""What the user asks for: one frozen model, its sources, and their precedence.

Sources, first one wins, setting by setting: ``--kv-compression-config``, then
``additional_config={"kvzip": {...}}``, then ``LLM_KVZIP_*`` variables, then the defaults. A flag
that is given several times counts as one source, the last one on top. Imports no torch, and never
reads the environment itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
)

from vllm_kvzip.errors import ConfigError, suggest
from vllm_kvzip.registry import FORMATS

METHOD = "kvzip"
ENABLED_VARIABLE = "LLM_KVZIP_ENABLED"
VARIABLE_PREFIX = "LLM_KVZIP_"
FLAG = "--kv-compression"
CONFIG_FLAG = "--kv-compression-config"

Budget = Literal["uniform", "profile", "retrieval", "adaptive", "adaptive-per-layer"]
Mode = Literal["evict", "quantize", "mixed"]
Rotation = Literal["auto", "hadamard", "none"]

DEFAULT_RATIOS: dict[Mode, float] = {"evict": 0.5, "quantize": 1.0, "mixed": 0.5}
DEFAULT_FULL_SHARE = 0.1
MOST_KEPT = 0.75
"""Default of ``keep_ratio`` where a quality loss decides how much of that is used."""
QUANTIZED_SETTINGS = ("key_format", "value_format", "rotation")

Flag = str | Mapping[str, Any]
"""A value of ``--kv-compression-config``: JSON text, a path to a JSON file, or a mapping."""

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


def shown(default: str) -> dict[str, JsonValue]:
    """How the documents show a default that depends on other things."""
    return {"shown": default}


class KVzipConfig(BaseModel):
    """Every setting of the plugin, with its default.

    ``docs/settings.md`` is made of the descriptions (``scripts/document_settings.py``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Mode = Field(
        "evict",
        description="what becomes of a prompt's KV pairs. `evict` drops what is not kept. "
        "`quantize` keeps what it keeps in fewer bits. `mixed` keeps the best KV pairs as they are "
        "and the next ones quantized; see [Quantized pages](quantized_pages.md)",
    )
    keep_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="KV pairs kept / all KV pairs, in the whole blocks of the prompt; in (0, 1]. "
        "(kvpress counts what is *removed*.)",
        json_schema_extra=shown(f"0.5; `quantize` 1.0; with `quality_loss` {MOST_KEPT}"),
    )
    keep_bytes_ratio: float | None = Field(
        None, gt=0, le=1, description="bytes kept / all bytes; replaces `keep_ratio`"
    )
    quality_loss: float | None = Field(
        None,
        gt=0,
        description="nats a token that compressing a prompt may cost, by estimate, such as 0.02. "
        "Each prompt then keeps as little as that allows, and at most `keep_ratio`; see [A promise "
        "instead of a ratio](profiles.md#a-promise-instead-of-a-ratio)",
    )
    full_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="mode `mixed`: share of the bytes for KV pairs that are kept as they are",
        json_schema_extra=shown(f"the profile's, else {DEFAULT_FULL_SHARE}"),
    )
    key_format: str = Field("nf4", description="format of quantized keys: `nf4`, `int4` or `int8`")
    value_format: str = Field(
        "nf4", description="format of quantized values: `nf4`, `int4` or `int8`"
    )
    rotation: Rotation = Field(
        "auto",
        description="Hadamard rotation before quantizing, which spreads outliers: `hadamard`, "
        "`none`, or `auto`, which rotates where the head size has such a matrix",
    )
    scorer: str | None = Field(
        None,
        description="which KV pairs a head keeps; see [Scorers](#scorers)",
        json_schema_extra=shown("`surrogate` with a profile, else `contrast`"),
    )
    budget: Budget | None = Field(
        None,
        description="how pages are shared between heads: `adaptive` (one ranking over all layers "
        "and heads), `adaptive-per-layer`, `uniform`, `profile` (shares from the profile) or "
        "`retrieval` (heads that the profile calls important keep everything, the others keep sink "
        "tokens and recent tokens)",
        json_schema_extra=shown("the scorer's own, else `profile`, else `adaptive`"),
    )
    profile: str | None = Field(
        "auto",
        description="head profile: a path, `auto` (the file that matches the model), `build` (as "
        "`auto`; where none is found, the engine makes one when it starts) or `none`",
    )
    profile_cache: str | None = Field(
        None,
        description="folder of the profiles that engines built; `$XDG_CACHE_HOME` is respected",
        json_schema_extra=shown("`~/.cache/vllm-kvzip`"),
    )
    profile_text: str | None = Field(
        None,
        description="text file to calibrate on, with `profile: build`",
        json_schema_extra=shown("our own texts"),
    )
    profile_build_seconds: float = Field(
        300,
        gt=0,
        description="how long building a profile may take until the engine goes on without one",
    )
    min_prompt_tokens: int = Field(
        256, ge=0, description="shorter prompts are left alone and cost nothing"
    )
    min_output_tokens: int = Field(
        0,
        ge=0,
        description="requests with a smaller `max_tokens` are left alone, unless they declare a "
        "context that others reuse",
    )
    prefill_budget: int | None = Field(
        None,
        gt=0,
        description="tokens whose KV pairs a prompt holds at most while it is read; in modes "
        "`quantize` and `mixed` their bytes; see "
        "[Prompts longer than the pool](long_prompts.md#prompts-longer-than-the-pool)",
    )
    decode_budget: int | None = Field(
        None,
        gt=0,
        description="tokens whose KV pairs a request holds at most while it generates; in modes "
        "`quantize` and `mixed` their bytes; see "
        "[Long answers](long_prompts.md#long-answers)",
    )
    sink_tokens: int = Field(4, ge=0, description="first tokens, which every head keeps")
    recent_tokens: int = Field(
        16, ge=0, description="last tokens of the compressed prefix, which every head keeps"
    )
    observation_window_tokens: int = Field(
        32, ge=1, description="last prompt tokens whose attention scorer `window` looks at"
    )
    prefix_reuse: Literal["compressed", "raw"] = Field(
        "compressed",
        description="which prefix a request starts from when both are cached and equally long: "
        "`compressed` or `raw`. The longer one wins",
    )
    reuse_ttl_seconds: float | None = Field(
        None, gt=0, description="a compressed prefix that nobody used for so long is forgotten"
    )
    contexts_dir: str | None = Field(
        None,
        min_length=1,
        description="folder of exported contexts; see [A context on another "
        "server](contexts.md#a-context-on-another-server)",
    )
    contexts_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="bytes of all files in `contexts_dir`, such as `20GiB`; least recently used "
        "ones go first",
    )
    repeat_prompt: str | None = Field(
        None,
        min_length=1,
        description="wording that asks the model to repeat its context, for scorer `kvzip`",
        json_schema_extra=shown(
            "the profile's, else KVzip's, at the end of the user's turn where the tokenizer has a "
            "chat template"
        ),
    )
    scoring_chunk_tokens: int = Field(
        2048,
        ge=16,
        description="tokens that the model repeats at once, for scorer `kvzip`; never more than "
        "a step takes (`--max-num-batched-tokens`). Short chunks lose quality, because the model "
        "sees nothing of the context but sink tokens and the chunk",
    )
    attention_kernel: Literal["auto", "triton", "vllm"] = Field(
        "auto",
        description="GPUs only: whose kernel attends over compressed prefixes, `triton` (the "
        "plugin's) or `vllm`. `auto` times both when the engine starts",
    )
    seed: int = Field(0, description="seed of scorer `random`")

    @field_validator("key_format", "value_format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        FORMATS.check(name)
        return name

    @property
    def ratio(self) -> float:
        """Kept / all: of bytes when ``keep_bytes_ratio`` is given, else of KV pairs."""
        if self.keep_bytes_ratio is not None:
            return self.keep_bytes_ratio
        if self.keep_ratio is not None:
            return self.keep_ratio
        return DEFAULT_RATIOS[self.mode] if self.quality_loss is None else MOST_KEPT


def is_enabled(
    flag: str | None, environ: Mapping[str, str], additional: Mapping[str, Any] | None
) -> bool:
    """Whether the user turned compression on, by any of the three ways.

    A misspelt variable is refused here, while compression is still off: a typing error in
    ``LLM_KVZIP_ENABLED`` must not leave it off without a word.

    Raises:
        ConfigError: if ``LLM_KVZIP_ENABLED`` is neither a yes nor a no, or a variable is unknown.
    """
    known = [ENABLED_VARIABLE, *(VARIABLE_PREFIX + key.upper() for key in KVzipConfig.model_fields)]
    for name in environ:
        if name.startswith(VARIABLE_PREFIX) and name not in known:
            raise ConfigError(f"There is no variable {name}; {suggest(name, known)}")
    variable = environ.get(ENABLED_VARIABLE, "").strip().lower()
    if variable not in _TRUE | _FALSE:
        raise ConfigError(f"{ENABLED_VARIABLE}={variable!r} must be 1 (on) or 0 (off).")
    return flag == METHOD or METHOD in (additional or {}) or variable in _TRUE


def load_config(
    flag_value: Flag | Sequence[Flag] | None,
    environ: Mapping[str, str],
    additional: Mapping[str, Any] | None,
) -> KVzipConfig:
    """Merge all sources into one configuration.

    Args:
        flag_value: of ``--kv-compression-config``, or several, the last one on top.
        environ: the environment.
        additional: vLLM's ``additional_config``; its ``kvzip`` entry is used.

    Raises:
        ConfigError: for anything wrong, naming setting, value and source.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources = (
        (_from_environment(environ), VARIABLE_PREFIX + "*"),
        (_mapping((additional or {}).get(METHOD), f"additional_config[{METHOD!r}]"), None),
        (_from_flag(flag_value), CONFIG_FLAG),
    )
    for values, source in sources:
        for key, value in values.items():
            merged[key] = value
            origin[key] = source or f"additional_config[{METHOD!r}]"
            if source == VARIABLE_PREFIX + "*":
                origin[key] = VARIABLE_PREFIX + key.upper()
    _refuse_unknown(merged, origin)
    try:
        config = KVzipConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        reason = reason[0].lower() + reason[1:] + ("" if reason.endswith("?") else ".")
        raise ConfigError(f"{origin[key]}: {key}={first['input']!r} is wrong, {reason}") from error
    _refuse_contradictions(config, origin)
    return config


def merge_flag(
    additional: Mapping[str, Any] | None, flag_value: Flag | Sequence[Flag] | None
) -> dict[str, Any]:
    """The settings of ``additional_config["kvzip"]`` with those of the flag on top.

    Raises:
        ConfigError: if one of them cannot be read.
    """
    source = f"additional_config[{METHOD!r}]"
    return {**_mapping(additional, source), **_from_flag(flag_value)}


def merge_additional(earlier: Any, later: Any) -> Any:
    """vLLM's ``--additional-config`` given twice: the later value, with our settings of both.

    What is no mapping stays, and is refused where the settings are read.
    """
    if not isinstance(earlier, Mapping) or not isinstance(later, Mapping):
        return later
    given = [values[METHOD] for values in (earlier, later) if METHOD in values]
    for wrong in (v for v in given if not (v is None or v is True or isinstance(v, Mapping))):
        return {**later, METHOD: wrong}
    merged = {key: value for values in given for key, value in _mapping(values, METHOD).items()}
    return {**later, METHOD: merged} if given else later


def _from_flag(value: Flag | Sequence[Flag] | None) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    if not isinstance(value, str):
        return {key: setting for one in value for key, setting in _from_flag(one).items()}
    text = value.strip()
    if not text.startswith("{"):
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # also not UTF-8, no such home
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise ConfigError(
                f"{CONFIG_FLAG}: {value!r} is neither JSON nor a file that can be read ({reason})."
            ) from error
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{CONFIG_FLAG}: not valid JSON ({error}).") from error
    return _mapping(parsed, CONFIG_FLAG)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json would take the last one of two equal names."""
    values = dict(pairs)
    for name in values:
        if sum(name == other for other, _ in pairs) > 1:
            raise ConfigError(f"{CONFIG_FLAG}: {name} is given twice in one object; give it once.")
    return values


def _mapping(value: Any, source: str) -> Mapping[str, Any]:
    if value is None or value is True:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f'{source} must be a JSON object such as {{"keep_ratio": 0.3}}.')
    return value


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(VARIABLE_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(VARIABLE_PREFIX) and name != ENABLED_VARIABLE
    }


def _refuse_contradictions(config: KVzipConfig, origin: Mapping[str, str]) -> None:
    """Refuse settings that exclude each other, or that have no effect in this mode."""
    if "keep_ratio" in origin and "keep_bytes_ratio" in origin:
        raise ConfigError(
            f"{origin['keep_bytes_ratio']}: keep_bytes_ratio stands in place of keep_ratio; "
            f"give one of them."
        )
    for name in ("profile_text", "profile_build_seconds"):
        if name in origin and config.profile != "build":
            raise ConfigError(f"{origin[name]}: {name} has no effect; set profile to build.")
    if "contexts_bytes" in origin and config.contexts_dir is None:
        raise ConfigError(
            f"{origin['contexts_bytes']}: contexts_bytes has no effect; name a contexts_dir."
        )
    idle = [name for name in QUANTIZED_SETTINGS if config.mode == "evict"]
    idle += ["full_share"] if config.mode != "mixed" else []
    for name in idle:
        if name in origin:
            fitting = "mixed" if name == "full_share" else "quantize or mixed"
            raise ConfigError(
                f"{origin[name]}: {name} has no effect in mode {config.mode}; "
                f"set mode to {fitting}."
            )


def _refuse_unknown(merged: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    for key in merged:
        if key not in KVzipConfig.model_fields:
            hint = suggest(str(key), KVzipConfig.model_fields)
            raise ConfigError(f"{origin[key]}: there is no setting {key}; {hint}")
