"""What can be asked of ``vllm-kvzip profile``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_kvzip.head_profiles.calibration import CONTEXT_TOKENS, NETWORK_WIDTH, NUM_CONTEXTS
from vllm_kvzip.registry import FORMATS

LOSS_CONTEXTS = 9


def parse_args(argv: list[str] | None, prog: str | None = None) -> argparse.Namespace:
    """What the user asks for; ``prog`` is how the program is called, as messages begin.

    Args:
        argv: arguments; None: those of the process.
        prog: None: the script's name.
    """
    parser = argparse.ArgumentParser(prog, description="Build a head profile of a model, offline.")
    parser.add_argument("--model", required=True, help="folder of a model in transformers' format")
    parser.add_argument("--out", type=Path, help="default: profiles/<model name>.json")
    parser.add_argument("--overwrite", action="store_true", help="replace a profile that is there")
    parser.add_argument("--text", type=Path, nargs="+", help="calibration texts; default: our own")
    parser.add_argument("--task", choices=["retrieval"], help="synthetic contexts, for tiny models")
    parser.add_argument("--context-tokens", type=int, default=CONTEXT_TOKENS)
    parser.add_argument("--num-contexts", type=int, default=NUM_CONTEXTS)
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="repeated at once")
    parser.add_argument(
        "--repeat-prompt", help="asks for the context; default: as in KVzip, in the chat's form"
    )
    parser.add_argument(
        "--budgets",
        choices=["heads", "pairs"],
        default="heads",
        help="heads: the best heads keep everything (default); pairs: each head keeps its share of "
        "the best KV pairs, for scorers that rank a head's pairs well",
    )
    for half in ("key", "value"):
        parser.add_argument(
            f"--{half}-format", choices=FORMATS.names(), default="nf4",
            help=f"of quantized {half}s in mode mixed",
        )  # fmt: skip
    parser.add_argument(
        "--surrogate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the networks of scorer surrogate too (default)",
    )
    parser.add_argument(
        "--surrogate-width", type=int, default=NETWORK_WIDTH, help="hidden units per KV head"
    )
    parser.add_argument(
        "--following-share",
        type=float,
        default=0.0,
        help="how much of what networks learn is a pair's influence on how a text goes on, beside "
        "that on its repeat: 0.1 for models that write long answers; default 0",
    )
    parser.add_argument(
        "--loss-contexts",
        type=int,
        default=LOSS_CONTEXTS,
        help="contexts on which the loss curve of scorer surrogate is measured, for quality_loss; "
        "0: none",
    )
    parser.add_argument(
        "--only-loss-curve",
        action="store_true",
        help="keep the profile and the networks that are there, and measure their loss curve anew",
    )
    parser.add_argument("--seed", type=int, default=0, help="of contexts and networks")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    args = parser.parse_args(argv)
    for name in ("context_tokens", "num_contexts", "chunk_tokens", "surrogate_width", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.surrogate and args.num_contexts < 2:
        parser.error(
            "--num-contexts must be at least 2, one of which is kept for the test of the networks; "
            "or add --no-surrogate"
        )
    if args.loss_contexts and args.loss_contexts < 3:
        parser.error("--loss-contexts must be at least 3, or 0 for no loss curve")
    if args.only_loss_curve and not args.loss_contexts:
        parser.error("--only-loss-curve needs --loss-contexts of at least 3")
    if not 0 <= args.following_share < 1:
        parser.error("--following-share must be at least 0 and below 1, such as 0.1")
    follows = args.surrogate and args.following_share > 0
    args.following_tokens = max(2, args.context_tokens // 2) if follows else 0
    args.prog = parser.prog
    return args


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Build a profile; returns the exit code. See :func:`parse_args`."""
    args = parse_args(argv, prog)
    from vllm_kvzip.profiling.profile_heads import run

    return run(args)
