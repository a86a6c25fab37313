"""The tiny model as a MiMo, which has a layer that guesses: for speculative method ``mtp``.

MiMo's heads are as large as its hidden size says, so the hidden states are those of the tiny model
and as many zeros. It says what the tiny model says, up to rounding. Its MTP layer is the trained
EAGLE head, whose norms are not MiMo's: it guesses worse.
"""

import json
from pathlib import Path

import torch
from engine_job import MODEL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEAD = MODEL.parent / "tiny-eagle"
PROFILES = MODEL.parent.parent.parent / "profiles"


def widened(name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight of the tiny model that reads or writes the first half of the hidden states."""
    if name.endswith("norm.weight"):  # the mean over twice as many numbers is half as large
        return torch.cat([value, torch.zeros_like(value)]) / 2**0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.cat([value, torch.zeros_like(value)])
    return torch.cat([value, torch.zeros_like(value)], dim=1)


def mtp_layer(head: dict[str, torch.Tensor], target: dict[str, torch.Tensor]):
    """The head as MiMo's layer, wide; norms that it lacks have the usual size as their weight."""
    of_token, of_hidden = head.pop("fc.weight").chunk(2, dim=1)
    embeddings, norm = target["model.embed_tokens.weight"], target["model.norm.weight"]
    narrow = {
        **{name.removeprefix("layers.0."): value for name, value in head.items()},
        "hidden_layernorm.weight": norm,
        "token_layernorm.weight": rms(embeddings).expand(len(norm)),
        "input_layernorm.weight": rms(embeddings @ of_token.T).expand(len(norm)),
        "final_layernorm.weight": rms(norm).expand(len(norm)),
    }
    wide = {name: widened(name, value) for name, value in narrow.items()}
    rows = torch.cat([widened("", of_hidden), widened("", of_token)], dim=1)
    wide["input_proj.weight"] = torch.cat([rows, torch.zeros_like(rows)])
    return wide


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root of the mean square."""
    return values.pow(2).mean().sqrt()


def renamed(text: str, names: dict[str, str]) -> str:
    """A text in which some names are others."""
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    return text


def write_mtp_model(folder: Path) -> Path:
    """Write it as a folder that vLLM loads, and beside it the tiny model's head profile for it.

    Args:
        folder: where to; the profile is called as it is, with ``.json``.
    """
    config = json.loads((MODEL / "config.json").read_text())
    target = load_file(MODEL / "model.safetensors")
    head = {n: value.float() for n, value in load_file(HEAD / "model.safetensors").items()}
    weights = {name: widened(name, value) for name, value in target.items()}
    layer = mtp_layer(head, target)
    weights |= {f"model.mtp_layers.0.{name}": value for name, value in layer.items()}
    for name in list(weights):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = name.removesuffix("weight") + "bias"
            weights[bias] = torch.zeros(len(weights[name]))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["MiMoForCausalLM"], "model_type": "qwen2",
        "hidden_size": 2 * config["hidden_size"], "num_nextn_predict_layers": 1,
        "rms_norm_eps": config["rms_norm_eps"] / 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = {MODEL.name: folder.name, "LlamaForCausalLM": config["architectures"][0]}
    profile = (PROFILES / f"{MODEL.name}.json").read_text()
    folder.with_suffix(".json").write_text(renamed(profile, names))
    networks = PROFILES / f"{MODEL.name}.safetensors"
    with safe_open(networks, "pt") as file:
        metadata = {key: renamed(value, names) for key, value in file.metadata().items()}
    save_file(load_file(networks), folder.with_suffix(".safetensors"), metadata)
    return folder
