"""What does each format of quantized pages lose, and how many tokens does a page then hold?

    python scripts/eval_quantization.py

Vectors go through the bytes of head pages, packed and unpacked as the plugin lays them out, and
are compared with what went in: the mean over vectors of their cosine similarity, and the norm of
the difference over the norm. "Rotated" means rotated before packing and back after unpacking.

Four kinds of synthetic vectors, and keys (after rotary embedding) and values of a small model that
reads a context of facts in filler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context
from vllm_kvzip.quantization import (
    Format,
    Int4,
    Int8,
    NormalFloat4,
    PageLayout,
    pack_pages,
    rotate,
    rotate_back,
    unpack_pages,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_SIZE = 16  # tokens of an ordinary page
ITEM_BYTES = 2  # of its elements
OUTLIER_SPACING, OUTLIER_FACTOR = 64, 10  # one dimension in 64, so many times as large
TINY_MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-retriever"


@dataclass(frozen=True)
class Loss:
    """What a format does to some vectors.

    Attributes:
        cosine: mean cosine similarity per vector.
        error: norm of the difference over the norm, of all vectors together.
    """

    cosine: float
    error: float


@dataclass(frozen=True)
class Row:
    """One row of a table: bits per value with all scales, tokens a page, and losses by kind."""

    format: str
    bits: float
    page_tokens: int
    losses: dict[str, Loss]


def formats(head_dim: int) -> dict[str, Format]:
    """By a readable name; blocks are no larger than a vector."""
    sizes = sorted({min(size, head_dim) for size in (64, 32)}, reverse=True)
    double = "nf4 with double quantization"
    return {
        "int8": Int8(),
        **{f"int4, blocks of {size}": Int4(size) for size in sizes},
        **{f"nf4, blocks of {size}": NormalFloat4(size) for size in sizes},
        **{
            f"{double}, blocks of {size}": NormalFloat4(size, double_quantization=True)
            for size in sizes
        },
    }


def page_layout(form: Format, head_dim: int) -> PageLayout:
    """Keys and values alike, in the bytes of an ordinary 16-bit page."""
    return PageLayout(2 * BLOCK_SIZE * head_dim * ITEM_BYTES, head_dim, form, form)


def synthetic_vectors(
    num_tokens: int = 4096, head_dim: int = 128, seed: int = 0
) -> dict[str, torch.Tensor]:
    """float32 ``[T, D]`` of each kind."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(num_tokens, head_dim, generator=generator)

    is_outlier = torch.arange(head_dim) % OUTLIER_SPACING == OUTLIER_SPACING // 2
    return {
        "normal": normal(),
        "uniform": torch.rand(num_tokens, head_dim, generator=generator) * 2 - 1,
        "bimodal": normal().sign() + normal() / 4,
        "outlier-heavy": normal() * torch.where(is_outlier, OUTLIER_FACTOR, 1),
    }


def measure(vectors: Sequence[torch.Tensor], form: Format, *, rotated: bool) -> Loss:
    """What packing and unpacking loses.

    Args:
        vectors: some ``[T, D]``, each of one head.
        form: how they are stored.
        rotated: whether they are rotated meanwhile.
    """
    cosines, differences, norms = [], [], []
    for exact in vectors:
        layout = page_layout(form, exact.shape[1])
        stored = rotate(exact) if rotated else exact
        found = unpack_pages(pack_pages(stored, stored, layout), layout)[0][: len(exact)]
        found = rotate_back(found) if rotated else found
        cosines.append(torch.cosine_similarity(found.double(), exact.double(), dim=1))
        differences.append((found.double() - exact.double()).square().sum())
        norms.append(exact.double().square().sum())
    error = (torch.stack(differences).sum() / torch.stack(norms).sum()).sqrt()
    return Loss(float(torch.cat(cosines).mean()), float(error))


def synthetic_losses(
    form: Format, *, rotated: bool, num_tokens: int = 4096, head_dim: int = 128
) -> dict[str, Loss]:
    """By kind of vectors."""
    kinds = synthetic_vectors(num_tokens, head_dim)
    return {kind: measure([vectors], form, rotated=rotated) for kind, vectors in kinds.items()}


@torch.inference_mode()
def model_vectors(model: Path, num_tokens: int = 1024, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keys and values of a context, float32 ``[L * H, T, D]``."""
    context = make_context(np.random.default_rng(seed), num_tokens)
    language_model = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    cache: Any = DynamicCache()
    language_model.model(torch.from_numpy(context.tokens)[None], past_key_values=cache)
    return {
        "keys": torch.cat([layer.keys[0] for layer in cache.layers]),
        "values": torch.cat([layer.values[0] for layer in cache.layers]),
    }


def table(kinds: dict[str, Sequence[torch.Tensor]], head_dim: int) -> list[Row]:
    """One row per format, without and with rotation."""
    rows = []
    for name, form in formats(head_dim).items():
        tokens = page_layout(form, head_dim).page_tokens
        bits = form.bits_per_value(head_dim, tokens)
        for rotated in (False, True):
            losses = {
                kind: measure(vectors, form, rotated=rotated) for kind, vectors in kinds.items()
            }
            rows.append(Row(f"{name}; rotated" if rotated else name, bits, tokens, losses))
    return rows


def show(title: str, rows: list[Row]) -> None:
    """As Markdown: cosine similarity, and relative error in brackets."""
    print(f"\n{title}\n")
    print("| format | bits a value | tokens a page | " + " | ".join(rows[0].losses) + " |")
    print("|---" * (3 + len(rows[0].losses)) + "|")
    for row in rows:
        tokens = f"{row.page_tokens} ({row.page_tokens / BLOCK_SIZE:.2f}x)"
        cells = [f"{loss.cosine:.5f} ({loss.error:.3f})" for loss in row.losses.values()]
        print("| " + " | ".join([row.format, f"{row.bits:.3f}", tokens, *cells]) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="folder")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--head-dim", type=int, default=128, help="of the synthetic vectors")
    parser.add_argument("--vectors", type=int, default=4096, help="synthetic ones of each kind")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    vectors = synthetic_vectors(args.vectors, args.head_dim)
    rows = table({kind: [found] for kind, found in vectors.items()}, args.head_dim)
    about = f"pages of {BLOCK_SIZE} 16-bit tokens, mean cosine similarity (relative error)"
    show(f"{args.vectors} synthetic vectors of size {args.head_dim}, {about}", rows)
    real = model_vectors(args.model, args.context_tokens)
    head_dim = real["keys"].shape[2]
    real_rows = table({kind: list(heads) for kind, heads in real.items()}, head_dim)
    show(
        f"keys and values of {args.model.name}, size {head_dim}, {args.context_tokens} tokens, "
        f"{about}",
        real_rows,
    )
    print(
        f"\ntorch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
    if args.json:
        found = {"synthetic": rows, "model": real_rows}
        values = {kind: [asdict(row) for row in made] for kind, made in found.items()}
        args.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
