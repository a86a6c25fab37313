"""The test model with a bias on its keys that changes no logit, and the same one without it."""

import json
import shutil

import torch
from engine_job import MODEL
from safetensors.torch import load_file, save_file

BIAS = 100.0


def make_pair(folder, bias=BIAS):
    """Two models whose queries do not look at two channels of every head, turned together by RoPE.

    Returns:
        their folders: keys without a bias, and with one on these channels.
    """
    config = json.loads((MODEL / "config.json").read_text())
    head_dim, num_heads = config["head_dim"], config["num_attention_heads"]
    hidden, num_kv_heads = config["hidden_size"], config["num_key_value_heads"]
    channels = [head_dim // 4, head_dim // 4 + head_dim // 2]
    plain = load_file(MODEL / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn."
        queries = plain[name + "q_proj.weight"]
        queries.view(num_heads, head_dim, -1)[:, channels] = 0
        sizes = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim}
        sizes |= {"v": num_kv_heads * head_dim, "o": hidden}
        for short, size in sizes.items():
            plain[f"{name}{short}_proj.bias"] = torch.zeros(size)
    biased = {name: tensor.clone() for name, tensor in plain.items()}
    for name, tensor in biased.items():
        if name.endswith("k_proj.bias"):
            tensor.view(num_kv_heads, head_dim)[:, channels] = bias
    folders = []
    for name, tensors in (("plain", plain), ("biased", biased)):
        target = folder / name
        shutil.copytree(MODEL, target)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
        folders.append(target)
    return folders
