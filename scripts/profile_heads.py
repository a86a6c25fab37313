"""Build a head-budget profile of a model, offline.

    python scripts/profile_heads.py --model PATH [--out profiles/NAME.json] [--text FILE ...]
        [--overwrite]

Each calibration context is read once and then repeated, chunk by chunk, under KVzip's
reconstruction scoring. The mean score of a head's KV pairs is its importance, from which the
budgets follow: the most important heads keep everything, the others sinks and recent tokens. For
mode ``mixed`` it says besides what each head keeps as it is and what quantized, which follows from
what quantizing these contexts' keys and values loses. A heat map (layers x KV heads) is drawn
beside the JSON when matplotlib is installed.

Small networks are trained to predict how much single KV pairs matter (scorer ``surrogate``) and
written beside the JSON as safetensors; ``--no-surrogate`` leaves them out. What they learn is the
pairs' influence on what the model says, or KVzip's scores where those cost the model less on a
context that no network has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from masked_model import MaskedModel
from network_choice import NetworkChoice
from reconstruction_probe import layers_of
from retrieval_task import BASIC_VOCABULARY_SIZE, VOCABULARY, make_context
from tier_budgets import TierBudgetBuilder
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.calibration import (
    CONTEXT_TOKENS,
    KEEP_RATIOS,
    MIN_REPEATED_SHARE,
    NETWORK_WIDTH,
    NUM_CONTEXTS,
    calibration_contexts,
    default_material,
    read_material,
)
from vllm_kvzip.head_profiles.head_profile import HeadProfile, Provenance, save_profile
from vllm_kvzip.head_profiles.networks import LayerSurrogate, save_surrogate
from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
from vllm_kvzip.model.attention_kinds import slides_within, sliding_window, unusual_attention
from vllm_kvzip.planning.reconstruction import pair_fractions, retrieval_fractions
from vllm_kvzip.registry import FORMATS


def task_contexts(args: argparse.Namespace) -> list[list[int]]:
    """Contexts of the synthetic retrieval task, for the tiny test models."""
    rng = np.random.default_rng(args.seed)
    return [
        make_context(rng, args.context_tokens).tokens.tolist() for _ in range(args.num_contexts)
    ]


def draw_heat_map(profile: HeadProfile, path: Path) -> bool:
    """Draw importance and the budgets at keep ratio 0.3; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"importance": profile.importance, "budget at keep ratio 0.3": profile.fractions(0.3)}
    height = max(2.5, 0.3 * profile.model.num_layers + 1)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, height), constrained_layout=True)
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=title, xlabel="KV head", ylabel="layer")
    figure.colorbar(image, ax=axes)
    figure.suptitle(profile.model.name)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def refuse_unsupported(model: str, config: Any, context_tokens: int) -> None:
    """Refuse what is known from the configuration to have no whole KV heads to score.

    Args:
        model: as the user named it.
        config: of the text model, in transformers' format.
        context_tokens: of the contexts; a sliding window that holds them slides nowhere.

    Raises:
        ProfileError: for latent (MLA), sliding-window, linear and convolutional attention, and for
            what KV compression does not support.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    others = ", ".join(sorted(kinds - {"sliding_attention"}))
    window, remedy = sliding_window(config), "choose another model"
    if getattr(config, "kv_lora_rank", None):
        reason = "multi-head latent attention (MLA) caches no keys per head"
    elif unusual := unusual_attention(config):
        reason = f"KV compression does not support {unusual[0]}"
    elif others:
        reason = f"every layer must attend to the whole context, and it has {others}"
    elif slides_within(config, context_tokens):
        reason = "every layer must attend to the whole context, and it has sliding_attention"
        if window:
            reason += f" with sliding_window={window}"
            remedy = f"set --context-tokens to {window} or less, or {remedy}"
    else:
        return
    raise ProfileError(f"--model {model} cannot be profiled: {reason}; {remedy}.")


def refuse_unwatchable(model: str, config: Any) -> None:
    """Refuse a model that transformers runs with attention of its own.

    Args:
        model: as the user named it.
        config: of the model, in transformers' format.

    Raises:
        ProfileError: for such a model.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None and not kind._supports_attention_backend:
        raise ProfileError(
            f"--model {model} cannot be profiled: transformers lets nobody watch the attention of "
            f"{kind.__name__}; let the engine profile it (--kv-compression-config.profile build)."
        )


def load_probe(model: str, context_tokens: int) -> tuple[MaskedModel, Any]:
    """The model, ready to be watched, and its tokenizer.

    Raises:
        ProfileError: if it cannot be loaded or is of an unsupported kind.
    """
    folder = Path(model)
    try:
        if not folder.is_dir() and (folder.is_absolute() or model.startswith(".")):
            raise FileNotFoundError("there is no such folder.")
        path = os.path.abspath(folder) if folder.is_dir() else model  # "." has no name
        config = AutoConfig.from_pretrained(path)
        refuse_unsupported(model, config.get_text_config(), context_tokens)
        refuse_unwatchable(model, config)
        probe = MaskedModel(path)
        _ = probe.fingerprint  # needs attention heads in the configuration
        return probe, AutoTokenizer.from_pretrained(path)
    except ProfileError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ProfileError(f"--model {model} cannot be profiled: {reason}") from error


def check_output(path: Path, *, overwrite: bool) -> None:
    """Find out before the long work whether its result can be written.

    Args:
        path: of the profile; networks go beside it.
        overwrite: whether files that are there may be replaced.

    Raises:
        ProfileError: if it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder; name a file")
    except OSError as error:
        raise ProfileError(f"--out {path} cannot be written ({error.strerror}).") from error
    there = [file for file in (path, path.with_suffix(".safetensors")) if file.is_file()]
    if there and not overwrite:
        raise ProfileError(
            f"{there[0]} is there already; name another file with --out, or add --overwrite."
        )


def build_profile(args: argparse.Namespace) -> tuple[HeadProfile, list[LayerSurrogate] | None]:
    """Score all contexts and average; train the networks of scorer surrogate if they are wanted.

    Those learn from all contexts but the last, on which they are tried.

    Raises:
        ProfileError: if model or text cannot be used.
    """
    probe, tokenizer = load_probe(args.model, args.context_tokens)
    fingerprint = probe.fingerprint
    if args.task == "retrieval":
        if probe.config.vocab_size not in (BASIC_VOCABULARY_SIZE, len(VOCABULARY.words)):
            raise ProfileError(
                "--task retrieval is for models of scripts/train_tiny_model.py only."
            )
        contexts = task_contexts(args)
        texts = [f"retrieval task, seed {args.seed}"]
    else:
        material = read_material(args.text) if args.text else default_material()
        contexts = calibration_contexts(
            tokenizer, material, args.num_contexts, args.context_tokens, args.seed
        )
        texts = [part.label for part in material]
    wording = repeat_wording(args.repeat_prompt, None, tokenizer)
    try:
        first_ids, later_ids = wording.token_ids(tokenizer)
    except ValueError as error:
        raise ProfileError(f"--repeat-prompt {error}") from error
    passes = len(contexts) * (1 + -(-args.context_tokens // args.chunk_tokens))
    choice = layers = None
    if args.surrogate:
        passes += len(contexts) * -(-args.context_tokens // args.chunk_tokens)
        passes += NetworkChoice.NUM_TARGETS * fingerprint.num_layers
        choice = NetworkChoice(probe, args.context_tokens, args.surrogate_width, args.seed)
    shape = fingerprint.num_layers, fingerprint.num_kv_heads
    tiers = tier_builder(args, *shape, fingerprint.head_dim)
    importance = torch.zeros(shape, dtype=torch.float64)
    budgets = {ratio: torch.zeros_like(importance) for ratio in KEEP_RATIOS}
    with tqdm(total=passes, desc="forward passes") as bar:
        for number, context in enumerate(contexts):
            cache = probe.read(context)
            bar.update()
            scores = probe.score(
                context, args.chunk_tokens, first_ids, later_ids, bar.update, cache=cache
            )
            if not bool((scores.flatten(1).amax(dim=1) > 0).all()):  # never asked, or NaN
                raise ProfileError(
                    f"--model {args.model} cannot be profiled: some layers show no attention, or "
                    f"it is not a number; choose another model."
                )
            importance += scores.mean(dim=-1) / len(contexts)
            for ratio in KEEP_RATIOS if args.budgets == "pairs" else ():
                budgets[ratio] += pair_fractions(scores, ratio) / len(contexts)
            if tiers is not None:
                tiers.watch(cache)
                if args.budgets == "pairs":
                    tiers.solve(scores)
            if choice is not None:
                influence = probe.influence(
                    context, args.chunk_tokens, first_ids, later_ids, bar.update, cache
                )
                if number < len(contexts) - 1:
                    choice.add(layers_of(cache), influence, scores)
        if choice is not None:
            layers = choice.best(context, cache, first_ids, bar.update)
    for line in choice.report if choice is not None else ():
        print(line)
    print(f"the model repeats {probe.repeated_share:.1%} of the tokens right")
    if probe.repeated_share < MIN_REPEATED_SHARE:
        print(
            "profile_heads: warning: the model hardly repeats the contexts, so this profile may be "
            "worse than none; try another --repeat-prompt, or --text of a kind that it knows.",
            file=sys.stderr,
        )
    if args.budgets == "heads":
        budgets = {ratio: retrieval_fractions(importance, ratio) for ratio in KEEP_RATIOS}
        if tiers is not None:  # all pairs of a head count as much as the head
            tiers.solve(importance[..., None].expand(-1, -1, args.context_tokens))
    profile = HeadProfile(
        schema_version=1,
        model=fingerprint,
        provenance=Provenance(
            method=f"kvzip reconstruction, budgets by {args.budgets}"
            + (f", networks by {choice.target}" if choice is not None else ""),
            repeat_prompt=wording.first,
            later_repeat_prompt=wording.later,
            scoring_chunk_tokens=args.chunk_tokens,
            num_contexts=len(contexts),
            context_tokens=args.context_tokens,
            repeated_share=round(probe.repeated_share, 3),
            texts=texts,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "vllm-kvzip": version("vllm-kvzip"),
            },
            created=date.today().isoformat(),
        ),
        importance=importance.clamp(0, 1).tolist(),
        budgets={str(ratio): grid.clamp(0, 1).tolist() for ratio, grid in budgets.items()},
        tiers=None if tiers is None else tiers.result(),
    )
    return profile, layers


def tier_builder(
    args: argparse.Namespace, num_layers: int, num_kv_heads: int, head_dim: int
) -> TierBudgetBuilder | None:
    """What makes budgets of two tiers; None when the formats do not suit the head size."""
    try:
        return TierBudgetBuilder(
            num_layers, num_kv_heads, head_dim, args.key_format, args.value_format
        )
    except ValueError as error:
        print(f"profile_heads: warning: no budgets for mode mixed: {error}", file=sys.stderr)
        return None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    parser.add_argument("--seed", type=int, default=0, help="of contexts and networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    for name in ("context_tokens", "num_contexts", "chunk_tokens", "surrogate_width", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.surrogate and args.num_contexts < 2:
        parser.error(
            "--num-contexts must be at least 2, one of which is kept for the test of the networks; "
            "or add --no-surrogate"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    out = args.out or Path("profiles") / f"{Path(os.path.abspath(args.model)).name}.json"
    try:
        check_output(out, overwrite=args.overwrite)
        profile, surrogate = build_profile(args)
    except ProfileError as error:
        print(f"profile_heads: error: {error}", file=sys.stderr)
        return 2
    save_profile(profile, out)
    if surrogate is not None:
        notes = {
            "texts": ", ".join(profile.provenance.texts),
            "created": profile.provenance.created,
        }
        save_surrogate(out.with_suffix(".safetensors"), surrogate, profile.model, notes)
    for layer, row in enumerate(profile.importance):
        print(f"layer {layer:3d}  " + "  ".join(f"{value:.3f}" for value in row))
    drawn = draw_heat_map(profile, out.with_suffix(".png"))
    print(
        json.dumps(
            {"profile": str(out), "heat_map": str(out.with_suffix(".png")) if drawn else None}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
