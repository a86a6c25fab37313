"""Build a head-budget profile of a model, offline.

    vllm-kvzip profile PATH [--out profiles/NAME.json] [--text FILE ...] [--overwrite]

Each calibration context is read once and then repeated, chunk by chunk, under KVzip's
reconstruction scoring. The mean score of a head's KV pairs is its importance, from which the
budgets follow: the most important heads keep everything, the others sinks and recent tokens. For
mode ``mixed`` it says besides what each head keeps as it is and what quantized, which follows from
what quantizing these contexts' keys and values loses. A heat map (layers x KV heads) is drawn
beside the JSON when matplotlib is installed.

Small networks are trained to predict how much single KV pairs matter (scorer ``surrogate``) and
written beside the JSON as safetensors; ``--no-surrogate`` leaves them out. What they learn is the
pairs' influence on what the model says while it repeats a context, with ``--following-share`` also
while it reads how the text goes on; or KVzip's scores where those cost the model less on a context
that no network has seen. What dropping pairs costs, by their scores, is measured on further
contexts, for the setting ``quality_loss`` (``loss_measurement.py``).
"""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.evaluation.tasks.retrieval_task import (
    BASIC_VOCABULARY_SIZE,
    QUESTION,
    VOCABULARY,
    make_context,
)
from vllm_kvzip.head_profiles.calibration import (
    KEEP_RATIOS,
    MIN_REPEATED_SHARE,
    calibration_contexts,
    default_material,
    read_material,
)
from vllm_kvzip.head_profiles.head_profile import (
    HeadProfile,
    Provenance,
    QualityCurve,
    check_matches,
    load_profile,
    save_profile,
)
from vllm_kvzip.head_profiles.networks import LayerSurrogate, load_surrogate, save_surrogate
from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
from vllm_kvzip.planning.reconstruction import pair_fractions, retrieval_fractions
from vllm_kvzip.profiling.context_cache import layers_of
from vllm_kvzip.profiling.loss_measurement import (
    LENGTHS,
    Probe,
    loss_curve,
    measure_losses,
    open_probes,
)
from vllm_kvzip.profiling.network_choice import NetworkChoice
from vllm_kvzip.profiling.probe_rotary import rotary_of
from vllm_kvzip.profiling.suitable_models import load_probe, refuse_lost_states
from vllm_kvzip.profiling.tier_budgets import TierBudgetBuilder

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from vllm_kvzip.profiling.masked_model import MaskedModel

SUFFIX = ".safetensors"  # of the networks, beside the profile


def task_contexts(args: argparse.Namespace) -> list[list[int]]:
    """Contexts of the synthetic retrieval task, for the tiny test models."""
    rng = np.random.default_rng(args.seed)
    length = args.context_tokens + args.following_tokens
    return [make_context(rng, length).tokens.tolist() for _ in range(args.num_contexts)]


def loss_contexts(args: argparse.Namespace, tokenizer: Any) -> list[tuple[list[int], list[Probe]]]:
    """Contexts for the loss curve, of several lengths, and what is asked behind each."""
    lengths = [
        max(64, round(args.context_tokens * LENGTHS[number % len(LENGTHS)]))
        for number in range(args.loss_contexts)
    ]
    if args.task == "retrieval":
        rng = np.random.default_rng(args.seed + 1)
        made = [make_context(rng, length) for length in lengths]
        marker = VOCABULARY.ids[QUESTION]
        return [
            (context.tokens.tolist(), [Probe([marker, key], 1) for key in [*context.facts][:16]])
            for context in made
        ]
    material = read_material(args.text) if args.text else default_material()
    longest = calibration_contexts(
        tokenizer, material, args.loss_contexts, max(lengths), args.seed + 1
    )
    return [
        (context[:length], open_probes(tokenizer, number))
        for number, (context, length) in enumerate(zip(longest, lengths, strict=True))
    ]


def measure_curve(
    args: argparse.Namespace,
    probe: MaskedModel,
    tokenizer: Any,
    networks: list[LayerSurrogate],
    progress: Callable[[], Any],
) -> dict[str, QualityCurve] | None:
    """The loss curve of scorer ``surrogate``; None with a warning where there is none."""
    longest = round(args.context_tokens * max(LENGTHS))
    rotary = rotary_of(probe.model, longest, probe.scored)
    try:
        curve = loss_curve(
            measure_losses(probe, networks, rotary, loss_contexts(args, tokenizer), progress)
        )
    except ProfileError as error:
        print(f"{args.prog}: warning: {error}", file=sys.stderr)
        return None
    print(
        f"loss curve of {curve.num_contexts} contexts; rank correlation {curve.rank_correlation} "
        f"of the losses that it estimates for contexts which were left out"
    )
    return {"surrogate": curve}


def draw_heat_map(profile: HeadProfile, layers: list[int], path: Path) -> bool:
    """Draw importance and the budgets at keep ratio 0.3; False without matplotlib.

    Args:
        profile: what is drawn.
        layers: of the model, by row; see :class:`~.reconstruction_probe.ReconstructionProbe`.
        path: of the picture.
    """
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
        if layers[-1] >= len(layers):  # others lie between them
            axis.set_yticks(range(len(layers)), labels=layers)
    figure.colorbar(image, ax=axes)
    figure.suptitle(profile.model.name)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


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


def build_profile(
    args: argparse.Namespace,
) -> tuple[HeadProfile, list[LayerSurrogate] | None, list[int]]:
    """Score all contexts and average; train the networks of scorer surrogate if they are wanted.

    Those learn from all contexts but the last, on which they are tried.

    Returns:
        the profile, its networks, and the model's layer of each row.

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
            tokenizer,
            material,
            args.num_contexts,
            args.context_tokens + args.following_tokens,
            args.seed,
        )
        texts = [part.label for part in material]
    refuse_lost_states(args.model, probe, contexts[0])
    wording = repeat_wording(args.repeat_prompt, None, tokenizer)
    try:
        first_ids, later_ids = wording.token_ids(tokenizer)
    except ValueError as error:
        raise ProfileError(f"--repeat-prompt {error}") from error
    following = [context[args.context_tokens :] for context in contexts]
    contexts = [context[: args.context_tokens] for context in contexts]
    passes = len(contexts) * (1 + -(-args.context_tokens // args.chunk_tokens))
    choice = layers = None
    if args.surrogate:
        passes += len(contexts) * -(-args.context_tokens // args.chunk_tokens)
        passes += NetworkChoice.NUM_TARGETS * fingerprint.num_layers + args.loss_contexts
        passes += len(contexts) if args.following_tokens else 0
        choice = NetworkChoice(
            probe, args.context_tokens, args.surrogate_width, args.seed, args.following_share
        )
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
                tiers.watch(layers_of(cache, probe.scored))
                if args.budgets == "pairs":
                    tiers.solve(scores)
            if choice is not None:
                influence = probe.influence(
                    context, args.chunk_tokens, first_ids, later_ids, bar.update, cache
                )
                further_on = None
                if following[number]:
                    further_on = probe.influence_further_on(context, following[number], cache)
                    bar.update()
                if number < len(contexts) - 1:
                    choice.add(layers_of(cache, probe.scored), influence, scores, further_on)
        if choice is not None:
            layers = choice.best(context, cache, first_ids, bar.update)
        quality = None
        if layers is not None and args.loss_contexts:
            quality = measure_curve(args, probe, tokenizer, layers, bar.update)
    for line in choice.report if choice is not None else ():
        print(line)
    print(f"the model repeats {probe.repeated_share:.1%} of the tokens right")
    if probe.repeated_share < MIN_REPEATED_SHARE:
        print(
            f"{args.prog}: warning: the model hardly repeats the contexts, so this profile may be "
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
            following_tokens=args.following_tokens or None,
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
        quality=quality,
    )
    return profile, layers, probe.scored


def add_curve(args: argparse.Namespace, out: Path) -> int:
    """Measure the loss curve of a profile that is there; returns the exit code."""
    try:
        profile = load_profile(out)
        networks = load_surrogate(out.with_suffix(SUFFIX))
        probe, tokenizer = load_probe(args.model, args.context_tokens)
        check_matches(profile, probe.fingerprint, out)
        with tqdm(total=args.loss_contexts, desc="contexts") as bar:
            quality = measure_curve(args, probe, tokenizer, networks, bar.update)
    except ProfileError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2
    save_profile(profile.model_copy(update={"quality": quality}), out)
    return 0


def tier_builder(
    args: argparse.Namespace, num_layers: int, num_kv_heads: int, head_dim: int
) -> TierBudgetBuilder | None:
    """What makes budgets of two tiers; None when the formats do not suit the head size."""
    try:
        return TierBudgetBuilder(
            num_layers, num_kv_heads, head_dim, args.key_format, args.value_format
        )
    except ValueError as error:
        print(f"{args.prog}: warning: no budgets for mode mixed: {error}", file=sys.stderr)
        return None


def run(args: argparse.Namespace) -> int:
    """Build and write what ``command.py`` was asked for; returns the exit code."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = args.out or Path("profiles") / f"{Path(os.path.abspath(args.model)).name}.json"
    if args.only_loss_curve:
        return add_curve(args, out)
    try:
        check_output(out, overwrite=args.overwrite)
        profile, surrogate, layers = build_profile(args)
    except ProfileError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2
    save_profile(profile, out)
    if surrogate is not None:
        notes = {
            "texts": ", ".join(profile.provenance.texts),
            "created": profile.provenance.created,
        }
        save_surrogate(out.with_suffix(SUFFIX), surrogate, profile.model, notes)
    for layer, row in zip(layers, profile.importance, strict=True):
        print(f"layer {layer:3d}  " + "  ".join(f"{value:.3f}" for value in row))
    drawn = draw_heat_map(profile, layers, out.with_suffix(".png"))
    print(
        json.dumps(
            {"profile": str(out), "heat_map": str(out.with_suffix(".png")) if drawn else None}
        )
    )
    return 0
