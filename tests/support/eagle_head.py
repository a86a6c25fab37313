"""An EAGLE head for the tiny model, made of the model's own layers without training.

The tiny model copies with its first three layers: what they say is nearly always what the fourth
says too. A head of the first EAGLE kind gets the embedding of a token and the target's hidden state
before it; this one looks at the embedding, and runs those layers.
"""

import json
from pathlib import Path

import torch
from engine_job import MODEL
from safetensors.torch import load_file, save_file

LAYERS = 3


def write_eagle_head(folder: Path, hidden: float = 0.0) -> Path:
    """Write the head as a folder that vLLM loads.

    Args:
        folder: where to.
        hidden: weight of the target's hidden states; they disturb the guesses.
    """
    target = load_file(MODEL / "model.safetensors")
    stem = "model.layers."
    weights = {
        name.removeprefix("model."): value
        for name, value in target.items()
        if name.startswith(stem) and int(name.removeprefix(stem).split(".")[0]) < LAYERS
    }
    # vLLM leaves the first norm out, because the first kind of heads has none.
    embeddings = target["model.embed_tokens.weight"]
    norm = weights.pop("layers.0.input_layernorm.weight") / embeddings.pow(2).mean().sqrt()
    for projection in ("q", "k", "v"):
        weights[f"layers.0.self_attn.{projection}_proj.weight"] *= norm
    identity = torch.eye(embeddings.shape[1])
    weights["fc.weight"] = torch.cat([identity, hidden * identity], dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
