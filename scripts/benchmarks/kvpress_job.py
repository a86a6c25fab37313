"""Measure kvpress's methods, in an environment that has kvpress. Started by ``compare_kvpress.py``.

    python kvpress_job.py WORK.json RESULT.json

The context alone is prefilled and compressed; then each question is answered over a copy of that
cache, greedily, at positions that go on behind the context. ``WORK.json`` holds::

    model         folder
    documents     list of the fields of ``documents.Document``
    methods       names that ``make_press`` knows
    keep_ratios   name of the column -> KV pairs kept / all
    repeat_ids    what asks for the first chunk of a context, and for the later ones
    chunk_tokens  tokens KVzip lets the model repeat at once
    seed          of the random method
    scores        ``.npy`` file for KVzip's scores of the first document, float32 ``[L, H, T]``

``RESULT.json`` holds ``versions``, and ``cells``: method -> column -> see ``measure``. The method
``none`` compresses nothing and has the one column ``all``.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
import tqdm
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

SIMPLE = {
    "expected-attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
    "snapkv": kvpress.SnapKVPress,
    "streaming-llm": kvpress.StreamingLLMPress,
    "random": kvpress.RandomPress,
}
KVZIP: dict[str, dict[str, Any]] = {
    "kvzip": {},
    "kvzip+": {"kvzip_plus_normalization": True},
    "kvzip-per-layer": {"layerwise": True},
}


class RepeatWording:
    """In place of a tokenizer: gives the repeat prompts' token ids, whatever it is asked to encode.

    Args:
        first_ids: of the first chunk, which is asked for first.
        later_ids: of the others.
    """

    def __init__(self, first_ids: list[int], later_ids: list[int]) -> None:
        self._ids = itertools.chain([first_ids], itertools.repeat(later_ids))

    def encode(self, _text: str, **_options: Any) -> torch.Tensor:
        """int64 ``[1, n]``."""
        return torch.tensor([next(self._ids)], dtype=torch.int64)


@dataclass
class WordedKVzipPress(kvpress.KVzipPress):
    """KVzip with a repeat prompt that the model understands, on contexts without chat template.

    Attributes:
        repeat_ids: token ids of the repeat prompts of the first chunk and of the later ones.
        raw_scores: float32 ``[L, H, T]`` of the context compressed last, sinks not yet raised.
    """

    repeat_ids: list[list[int]] = field(default_factory=list)
    raw_scores: torch.Tensor | None = None

    def prepare(self, model: Any, tokenizer: Any, prev_postfix_size: int = 8) -> Any:
        """Called before the scoring passes; the chat template's parts are left out."""
        self.prefix_length = 0
        self._suffix_ids = torch.zeros(1, 0, dtype=torch.int64)
        return super().prepare(model, RepeatWording(*self.repeat_ids), prev_postfix_size)

    def compress_post(self, model: Any) -> None:
        """Called behind the scoring passes."""
        self.raw_scores = self.score_val[:, 0].clone()
        super().compress_post(model)


def make_press(method: str, keep_ratio: float, work: dict[str, Any]) -> Any:
    """The press of one method; kvpress counts what is removed."""
    removed = 1 - keep_ratio
    if method in KVZIP:
        return WordedKVzipPress(
            removed,
            chunk_size=work["chunk_tokens"],
            repeat_ids=work["repeat_ids"],
            **KVZIP[method],
        )
    if method == "adakv-snapkv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(removed))
    return SIMPLE[method](removed)


def compressed_cache(model: Any, tokens: list[int], press: Any) -> DynamicCache:
    """Prefill a context, and compress it when there is a press.

    Raises:
        RuntimeError: if KVzip's scoring passes left something behind in the cache.
    """
    cache = DynamicCache()
    with nullcontext() if press is None else press(model):
        model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    if isinstance(press, WordedKVzipPress) and cache.get_seq_length() != len(tokens):
        raise RuntimeError(f"KVzip left {cache.get_seq_length()} tokens of {len(tokens)}")
    return cache


def copy_of(cache: Any, times: int) -> DynamicCache:
    """The cache of one sequence, as that of ``times`` equal ones."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.repeat(times, 1, 1, 1), layer.values.repeat(times, 1, 1, 1), index)
    return copy


def set_masks(modules: list[Any], masks: list[Any], times: int) -> None:
    """Tell every attention layer which pairs of each of ``times`` equal sequences are evicted.

    Args:
        modules: attention layers.
        masks: for each, None or (batch index, KV head, token) of the pairs in one sequence, all
            int64 ``[n]``.
    """
    for module, mask in zip(modules, masks, strict=True):
        if mask is not None:
            _, heads, tokens = mask
            batch = torch.arange(times).repeat_interleave(len(heads))
            module.masked_key_indices = (batch, heads.repeat(times), tokens.repeat(times))


def decode(
    model: Any, cache: DynamicCache, questions: torch.Tensor, first: int, num_tokens: int
) -> torch.Tensor:
    """Greedy answers to questions of equal length.

    Args:
        cache: of the context, once for each question; grows.
        questions: int64 ``[B, q]``.
        first: position of the first token.
        num_tokens: length of the answers.

    Returns:
        int64 ``[B, num_tokens]``.
    """
    ids, answers = questions, []
    for _ in range(num_tokens):
        positions = torch.arange(first, first + ids.shape[1])[None].expand(len(ids), -1)
        logits = model(
            input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1
        ).logits
        first += ids.shape[1]
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        answers.append(ids)
    return torch.cat(answers, dim=1)


def right_tokens(model: Any, cache: DynamicCache, document: dict[str, Any]) -> tuple[int, int]:
    """Right answers, or answer tokens, and all; questions of equal lengths are one batch."""
    modules = [layer.self_attn for layer in model.model.layers]
    masks = [getattr(module, "masked_key_indices", None) for module in modules]
    groups: dict[tuple[int, int], list[dict[str, list[int]]]] = {}
    for question in document["questions"]:
        lengths = len(question["tokens"]), len(question["answer"])
        groups.setdefault(lengths, []).append(question)
    right = total = 0
    for (_, num_answer), group in groups.items():
        set_masks(modules, masks, len(group))
        asked = torch.tensor([question["tokens"] for question in group])
        first = len(document["tokens"])
        answers = decode(model, copy_of(cache, len(group)), asked, first, num_answer)
        for question, answer in zip(group, answers.tolist(), strict=True):
            hits = [
                mine == wanted
                for mine, wanted, counts in zip(
                    answer, question["answer"], question["scored"] or [True] * num_answer,
                    strict=True,
                )
                if counts
            ]  # fmt: skip
            right += all(hits) if question["is_whole"] else sum(hits)
            total += 1 if question["is_whole"] else len(hits)
    return right, total


def kept_bytes(model: Any, cache: Any) -> int:
    """Bytes of the KV pairs that are not evicted, were the others freed."""
    total = 0
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        mask = getattr(block.self_attn, "masked_key_indices", None)
        num_masked = 0 if mask is None else len(mask[0])
        num_pairs = layer.keys[..., 0].numel() - num_masked
        total += 2 * num_pairs * layer.keys.shape[-1] * layer.keys.element_size()
    return total


def storage_bytes(cache: Any) -> int:
    """Bytes of the memory behind a cache's tensors, however small a part of it they show."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@torch.inference_mode()
def measure(model: Any, documents: list[dict[str, Any]], press: Any) -> dict[str, Any]:
    """One method at one keep ratio.

    Returns:
        ``answers``: for each document, right answers or answer tokens, and all of them. Bytes,
        summed over the documents' caches: ``kept_bytes`` of the pairs that are not evicted,
        ``held_bytes`` of a cache from the first decoded token on, without that token,
        ``held_before_decode_bytes`` until then.
    """
    cell: dict[str, Any] = {"answers": []}
    cell |= dict.fromkeys(("kept_bytes", "held_bytes", "held_before_decode_bytes"), 0)
    for document in documents:
        cache = compressed_cache(model, document["tokens"], press)
        cell["kept_bytes"] += kept_bytes(model, cache)
        cell["held_before_decode_bytes"] += storage_bytes(cache)
        cell["held_bytes"] += storage_bytes(copy_of(cache, 1))
        cell["answers"].append(right_tokens(model, cache, document))
    return cell


def main(work_path: str, result_path: str) -> None:
    logging.disable(logging.WARNING)  # each press warns that it takes time
    transformers.utils.logging.disable_progress_bar()
    work = json.loads(Path(work_path).read_text(encoding="utf-8"))
    documents = work["documents"]
    model = AutoModelForCausalLM.from_pretrained(
        work["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    cells: dict[str, dict[str, Any]] = {"none": {"all": measure(model, documents, None)}}
    pairs = list(itertools.product(work["methods"], work["keep_ratios"].items()))
    for method, (column, keep_ratio) in tqdm.tqdm(pairs, desc="kvpress"):
        torch.manual_seed(work["seed"])
        press = make_press(method, keep_ratio, work)
        cells.setdefault(method, {})[column] = measure(model, documents, press)
        if method == "kvzip" and keep_ratio < 1 and not Path(work["scores"]).exists():
            with torch.inference_mode():
                compressed_cache(model, documents[0]["tokens"], press)
            np.save(work["scores"], press.raw_scores.numpy())
    versions = {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    result = {"versions": versions, "cells": cells}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
