"""EAGLE heads for the tiny model, made of the model's own layers without training.

The tiny model copies with its first three layers: what they say is nearly always what the fourth
says too. A head gets the embedding of a token and hidden states of the target before it; these look
at the embedding, and run those layers.
"""

import json
from pathlib import Path

import torch
from engine_job import MODEL
from safetensors.torch import load_file, save_file

LAYERS = 3


def write_eagle_head(folder: Path, method: str = "eagle") -> Path:
    """Write a head as a folder that vLLM loads.

    Args:
        folder: where to.
        method: vLLM's name of it, ``eagle`` or ``eagle3``.
    """
    target = load_file(MODEL / "model.safetensors")
    stem = "model.layers."
    weights = {
        name.removeprefix("model."): value
        for name, value in target.items()
        if name.startswith(stem) and int(name.removeprefix(stem).split(".")[0]) < LAYERS
    }
    embeddings = target["model.embed_tokens.weight"]
    size = embeddings.shape[1]
    projections = [f"layers.0.self_attn.{part}_proj.weight" for part in ("q", "k", "v")]
    if method == "eagle":  # without the first norm, and the embedding goes through all layers
        norm = weights.pop("layers.0.input_layernorm.weight") / embeddings.pow(2).mean().sqrt()
        for name in projections:
            weights[name] *= norm
        weights["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    else:  # the embedding goes into the first attention only
        for name in projections:
            weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
        weights["fc.weight"] = torch.zeros(size, 3 * size)
        for layer in range(LAYERS):
            weights[f"layers.{layer}.hidden_norm.weight"] = torch.ones(size)
        weights["norm.weight"] = target["model.norm.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    kind = {"eagle": "Eagle", "eagle3": "Eagle3"}[method]
    config |= {"architectures": [f"{kind}LlamaForCausalLM"], "num_hidden_layers": LAYERS}
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
