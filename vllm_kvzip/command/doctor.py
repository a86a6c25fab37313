"""``vllm-kvzip doctor``: will it start, with what, and how much does a KV cache hold then?"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_kvzip.model.attention_kinds import SLIDING_KIND, STATE_KINDS
from vllm_kvzip.model.cache_shares import in_percent

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.start.doctor import Compression, Diagnosis

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Say what `vllm serve` would do.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called.

    Returns:
        0 when it would start, else 1.
    """
    args, of_vllm = _parser(prog).parse_known_args(argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vllm_kvzip.vllm_bridge.start.doctor import diagnose

    found = diagnose(["--model", args.model, *of_vllm], args.memory_gib, args.prompt_tokens)
    if args.json:
        starts = {"starts": found.refusal is None, "memory_gib": args.memory_gib}
        print(json.dumps(starts | asdict(found), indent=2))
    else:
        print(in_words(found, args.memory_gib))
    return 0 if found.refusal is None else 1


def in_words(found: Diagnosis, memory_gib: float) -> str:
    """For people, several lines."""
    lines = [f"warning: {warning}" for warning in found.warnings]
    if found.refusal is not None or found.compression is None:
        return "\n".join([f"It will not start. {found.refusal}", *lines])
    rows = [
        "",
        f"Computed, not measured: a KV cache of {memory_gib:g} GiB a rank has {found.cache_blocks} "
        f"blocks, and holds whole prompts of",
        f"{'tokens':>8} | {'blocks each':>11} | {'compressed':>10} | {'tokens held':>11} | "
        f"{'compressed':>10}",
    ]
    rows += [
        f"{room.prompt_tokens:>8} | {room.blocks:>11} | {room.blocks_compressed:>10} | "
        f"{room.tokens:>11} | {room.tokens_compressed:>10}"
        for room in found.rooms
    ]
    return "\n".join(["It will start.", *_facts(found.compression), *rows, *lines])


def _facts(it: Compression) -> list[str]:
    profile = it.profile or "none"
    left_alone = {"others": _left_alone(it), "share": _shares(it)} if it.left_alone else {}
    ranks = f", over {it.num_ranks} ranks" if it.num_ranks > 1 else ""
    stages = f" in {it.num_stages} pipeline stages" if it.num_stages > 1 else ""
    facts = {
        "model": it.architecture,
        "compressed": f"{it.num_attention_layers} of {it.num_layers} layers{stages}, "
        f"{it.num_kv_heads} KV heads of size {it.head_size}{ranks}: {it.attention}",
        **left_alone,
        "profile": f"{profile}, made when the engine starts" if it.builds_profile else profile,
        "scorer": f"{it.scorer}, budget {it.budget}",
        "mode": f"{it.mode}, {_kept(it)}",
        **({"budgets": _budgets(it)} if it.prefill_budget or it.decode_budget else {}),
        "KV cache": f"blocks of {it.block_size} tokens{_pages(it)}, {it.cache_dtype}",
    }
    return [f"  {name:<10}  {fact}" for name, fact in facts.items()]


def _kept(it: Compression) -> str:
    """How much of a prompt."""
    share = f"{it.keep_ratio:g} of the {it.counts} of a prompt"
    if it.quality_loss is None:
        return f"{share} are kept"
    return f"at most {share} are kept, and as few as cost {it.quality_loss:g} nats a token"


def _budgets(it: Compression) -> str:
    """What a request holds between rounds."""
    tokens = {"while its prompt is read": it.prefill_budget}
    tokens["while it generates"] = it.decode_budget or it.prefill_budget
    parts = [f"{count:,} tokens {when}" for when, count in tokens.items() if count]
    held = "" if it.mode == "evict" else "the bytes of "
    return f"a request holds {held}{' and '.join(parts)}, and half as many more before a round"


def _pages(it: Compression) -> str:
    """How blocks are cut, where they are."""
    if it.pages_per_head == 1:
        return ""
    return f", in head pages of {it.block_size // it.pages_per_head}"


def _left_alone(it: Compression) -> str:
    """The layers that are not compressed."""
    kinds = []
    for kind, number in it.left_alone.items():
        verb = "has" if number == 1 else "have"
        what = f"{verb} no KV cache ({kind})"
        if kind == SLIDING_KIND:
            what = f"{verb} a sliding window of {it.window:,} tokens"
        elif kind in STATE_KINDS:
            what = f"{verb} a state of fixed size ({kind})"
        kinds.append(f"{number} {what}")
    return f"{', '.join(kinds)}; they are left to vLLM"


def _shares(it: Compression) -> str:
    """How much of an uncompressed request can be compressed at all."""
    shares = [f"{in_percent(share)} at {tokens:,}" for tokens, share in it.shares.items()]
    return f"of the bytes of an uncompressed request, by its tokens: {', '.join(shares)}"


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog or '%(prog)s'} MODEL [flags of vllm serve, --kv-compression-config ...]",
        description="Say whether `vllm serve` starts with a model and its flags, what is "
        "compressed, and how much a KV cache holds. No weights are loaded. Exit code 1: it does "
        "not start.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="as for vllm serve; may stand first instead")
    parser.add_argument(
        "--memory-gib", type=_size, default=1.0, help="of the KV cache of each rank; default 1"
    )
    parser.add_argument(
        "--prompt-tokens", type=_length, nargs="+", help="lengths; default: usual ones"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _size(text: str) -> float:
    size = float(text)
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return size


def _length(text: str) -> int:
    length = int(text)
    if length < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return length
