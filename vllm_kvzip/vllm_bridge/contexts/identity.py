"""What two engines must have in common before one may use a compressed context of the other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvzip.contexts.model_digest import tokenizer_digest, weights_digest
from vllm_kvzip.vllm_bridge.fingerprint import model_fingerprint
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.settings import Settings

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def context_identity(vllm_config: VllmConfig, block_size: int) -> dict[str, str]:
    """What must be equal, by names that people read; reads samples of the model's files.

    The folder of the model may have another name: its weights tell which model it is. Neither the
    pool's size nor the hash function of the prefix cache matter.

    Args:
        vllm_config: of the engine.
        block_size: tokens per block of the compressed layers.
    """
    model = vllm_config.model_config
    shape = model_fingerprint(vllm_config).model_dump(exclude={"name"})
    parallel = vllm_config.parallel_config
    return {
        **{f"the model's {what}": str(value) for what, value in shape.items()},
        "the model's weights": _weights(vllm_config),
        "the tokenizer": _tokenizer(model),
        "the model's dtype": str(model.dtype).removeprefix("torch."),
        "the model's quantization": str(model.quantization or "none"),
        "hf_overrides": _as_text(model.hf_overrides or None),
        "the dtype of the KV cache": running_cache_dtype(vllm_config),
        "tensor_parallel_size": str(parallel.tensor_parallel_size),
        **_settings(Settings.from_vllm_config(vllm_config), block_size),
    }


def _settings(settings: Settings, block_size: int) -> dict[str, str]:
    names = {
        "version": "the version of the plugin",
        "format": "the format of compressed prefixes",
        "block_size": "the block size",
        "by_bytes": "whether keep_bytes_ratio is set",
        "surrogate": "the digest of the profile's networks",
    }
    shape = settings.shape(block_size)
    return {names.get(name, f"the setting {name}"): _as_text(of) for name, of in shape.items()}


def _as_text(value: Any) -> str:
    """A short value as it is, a longer one by its digest."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights(vllm_config: VllmConfig) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        return f"dummy weights of seed {model.seed}"
    name = str(model.model_weights or model.model)
    folder = _local(name, model.revision)
    digest = None if folder is None else weights_digest(folder)
    return digest or f"those of {name}"


def _tokenizer(model: Any) -> str:
    if model.skip_tokenizer_init:
        return "none"
    folder = _local(str(model.tokenizer), model.tokenizer_revision)
    digest = None if folder is None else tokenizer_digest(folder)
    return digest or f"that of {model.tokenizer}"


def _local(name: str, revision: str | None) -> Path | None:
    """Where a model's files lie on this machine; None where they are not found."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of the hub's
        return None
