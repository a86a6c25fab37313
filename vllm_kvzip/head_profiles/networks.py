"""A learned stand-in for scores of a second pass, a few thousand weights per KV head.

After KVzap (arXiv 2601.07891), which predicts the log of a KV pair's KVzip score from the hidden
state of its token. An attention layer does not see that state, but it sees keys and values, which
are linear maps of it. One small network per KV head reads the head's own key, with the rotation
taken off, and value, and how near the token is to the end of the context (some heads look for the
last token of a kind), and predicts the log score of the pair. It reads no other head, so it works
where ranks share the heads.

The file is safetensors, beside the model's head profile; ``vllm-kvzip profile`` makes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import gelu

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.head_profile import ModelFingerprint

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION = "2"
MIN_LOG_SCORE = -7.0  # beside the best ones; differences below it decide nothing
RECENCY_TOKENS = (16.0, 64.0, 256.0)  # lengths by which nearness to the end decays
_PARTS = ("mix", "mix_bias", "out", "out_bias")


@dataclass(frozen=True)
class LayerSurrogate:
    """The networks of one layer's H KV heads; M is their width, D the head dim.

    Attributes:
        mix: float32 ``[H, 2 * D + 3, M]``: of the key, the value, and recency.
        mix_bias: float32 ``[H, M]``.
        out: float32 ``[H, M]``.
        out_bias: float32 ``[H]``.
    """

    mix: torch.Tensor
    mix_bias: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor

    def to(self, device: torch.device) -> LayerSurrogate:
        """The same networks on a device."""
        return LayerSurrogate(*(getattr(self, part).to(device) for part in _PARTS))

    def of_heads(self, first: int, count: int) -> LayerSurrogate:
        """The networks of ``count`` neighbouring heads, as a tensor-parallel rank has them."""
        heads = slice(first, first + count)
        return LayerSurrogate(*(getattr(self, part)[heads] for part in _PARTS))

    def log_scores(self, features: torch.Tensor) -> torch.Tensor:
        """Predicted log scores, float32 ``[H, T]``.

        Args:
            features: float32 ``[H, T, 2 * D + 3]``, from :func:`token_features`.
        """
        return self._log_scores(torch.bmm(features, self.mix))

    def log_scores_of(
        self, keys: torch.Tensor, values: torch.Tensor, near: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same, part by part, so that the features need not be copied together.

        Args:
            keys: float32 ``[H, T, D]``, without their rotation.
            values: float32 ``[H, T, D]``.
            near: float32 ``[T, 3]``, of :func:`recency`; None: the last of the tokens is the end.
        """
        if near is None:
            near = recency(keys.shape[1], keys.device)
        head_dim = keys.shape[2]
        of_keys, of_values, of_recency = torch.split(
            self.mix, [head_dim, head_dim, len(RECENCY_TOKENS)], dim=1
        )
        mixed = torch.bmm(keys, of_keys)
        mixed.baddbmm_(values, of_values)
        mixed.baddbmm_(near.expand(len(keys), -1, -1), of_recency)
        return self._log_scores(mixed)

    def _log_scores(self, mixed: torch.Tensor) -> torch.Tensor:
        hidden = gelu(mixed + self.mix_bias[:, None], approximate="tanh")
        return torch.baddbmm(self.out_bias[:, None, None], hidden, self.out[..., None]).squeeze(-1)


def token_features(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What a head's network reads of each token: key without its rotation, value, recency.

    Args:
        keys: float32 ``[H, T, D]``, without their rotation.
        values: float32 ``[H, T, D]``.

    Returns:
        float32 ``[H, T, 2 * D + 3]``.
    """
    near = recency(keys.shape[1], keys.device).expand(len(keys), -1, -1)
    return torch.cat([keys, values, near], dim=2)


def recency(num_tokens: int, device: torch.device) -> torch.Tensor:
    """How near each token is to the end, float32 ``[T, 3]``, in (0, 1]."""
    distance = torch.arange(num_tokens - 1, -1, -1, dtype=torch.float32, device=device)
    return torch.stack([torch.exp(distance / -length) for length in RECENCY_TOKENS], dim=1)


def save_surrogate(
    path: Path, layers: list[LayerSurrogate], model: ModelFingerprint, notes: dict[str, str]
) -> None:
    """Write the networks with what they were made for.

    Args:
        path: of the file.
        layers: in layer order.
        model: what they must match.
        notes: how they were made, for people.
    """
    tensors = {
        f"layers.{index}.{part}": getattr(layer, part).contiguous()
        for index, layer in enumerate(layers)
        for part in _PARTS
    }
    metadata = {"schema_version": SCHEMA_VERSION, "model": model.model_dump_json(), **notes}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    path.chmod(0o644)


def load_surrogate(path: Path, running: ModelFingerprint | None = None) -> list[LayerSurrogate]:
    """Read the networks of all layers.

    Args:
        path: of the file.
        running: the model they are wanted for; None to skip the comparison.

    Raises:
        ProfileError: if the file is missing, broken, or made for another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {metadata.get('schema_version')!r}")
        model = ModelFingerprint.model_validate(json.loads(metadata["model"]))
        layers = [
            LayerSurrogate(*(tensors[f"layers.{index}.{part}"].float() for part in _PARTS))
            for index in range(model.num_layers)
        ]
        shape = model.num_kv_heads, 2 * model.head_dim + len(RECENCY_TOKENS)
        if any(layer.mix.shape[:2] != shape for layer in layers):
            raise ValueError(f"it has no {shape[0]} networks a layer that read {shape[1]} numbers")
    except FileNotFoundError as error:
        raise ProfileError(
            f"Scorer surrogate needs {path}; build it with `vllm-kvzip profile`."
        ) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ProfileError(
            f"{path} is no surrogate that can be read ({reason}); build it again with "
            f"`vllm-kvzip profile`."
        ) from error
    if running is not None and (difference := model.mismatch(running)):
        field, theirs, mine = difference
        raise ProfileError(
            f"Surrogate {path} was made for another model: its {field} is {theirs}, the running "
            f"model's is {mine}; build one with `vllm-kvzip profile`."
        )
    return layers
