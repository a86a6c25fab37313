"""Turn head scores that others have published into a head-budget profile.

    vllm-kvzip import-scores PATH --scores score.pt [score2.pt ...]
    vllm-kvzip import-scores PATH --scores full_attention_heads.tsv
    vllm-kvzip import-scores PATH --scores budgets.npy

``.pt``: KVzip's head scores, a tensor ``[layers, KV heads]``; several files are combined by their
maximum. ``.tsv``: DuoAttention's head pattern, a line per layer. ``.npy``: LU-KV's budget curves,
``[99, layers, KV heads]``, a share per head for each global percentage. The first two say how
important heads are; the most important ones then keep everything.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.evaluation.model_files import fingerprint_of
from vllm_kvzip.head_profiles.head_profile import HeadProfile, Provenance, save_profile
from vllm_kvzip.planning.reconstruction import retrieval_fractions

KEEP_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = {".pt": "KVzip head scores", ".tsv": "DuoAttention pattern", ".npy": "LU-KV budgets"}


def read_scores(path: Path) -> torch.Tensor:
    """One file as float64.

    Raises:
        ProfileError: if it cannot be read as what its name says.
    """
    try:
        if path.suffix == ".pt":
            values = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(values, torch.Tensor):
                raise ValueError(f"it holds a {type(values).__name__}, not a tensor")
            return values.to(torch.float64)
        if path.suffix == ".tsv":
            return torch.from_numpy(np.loadtxt(path, delimiter="\t", ndmin=2)).to(torch.float64)
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(torch.float64)
    except Exception as error:  # torch, numpy and pickle raise what they like
        reason = str(error).splitlines()[0].rstrip(".") or type(error).__name__
        raise ProfileError(f"--scores {path} cannot be read: {reason}.") from error


def check_shape(path: Path, found: torch.Tensor, wanted: tuple[int, ...]) -> None:
    """Refuse scores of another model, and such that are no numbers.

    Raises:
        ProfileError: names both shapes.
    """
    if tuple(found.shape) != wanted:
        raise ProfileError(
            f"--scores {path} has the shape {list(found.shape)}, the model needs {list(wanted)}."
        )
    if not bool(torch.isfinite(found).all()) or float(found.min()) < 0:
        raise ProfileError(f"--scores {path} must hold finite numbers that are not negative.")


def curves_to_budgets(path: Path, curves: torch.Tensor) -> dict[float, torch.Tensor]:
    """LU-KV's curves at our keep ratios.

    Its files do not say whether a percentage is kept or removed; the mean over the heads does.

    Raises:
        ProfileError: if it is neither.
    """
    shares = torch.arange(1, 100, dtype=torch.float64) / 100
    means = curves.clamp(0, 1).mean(dim=(1, 2))
    kept_error = float((means - shares).abs().mean())
    removed_error = float((means - (1 - shares)).abs().mean())
    if min(kept_error, removed_error) > 0.05:
        raise ProfileError(
            f"--scores {path}: the heads' shares do not average to the percentages 1 to 99."
        )
    kept = curves if kept_error <= removed_error else curves.flip(0)
    return {ratio: kept[round(ratio * 100) - 1].clamp(0, 1) for ratio in KEEP_RATIOS}


def build_profile(model: str, paths: list[Path]) -> HeadProfile:
    """Read the files and check them against the model.

    Raises:
        ProfileError: if a file is of another model, broken, or of a kind that is not known.
    """
    suffix = paths[0].suffix
    if suffix not in METHODS or any(path.suffix != suffix for path in paths):
        raise ProfileError(f"--scores must be files of one kind: {', '.join(METHODS)}.")
    if len(paths) > 1 and suffix != ".pt":
        raise ProfileError(f"--scores takes one {suffix} file.")
    fingerprint = fingerprint_of(model)
    grid = (fingerprint.num_layers, fingerprint.num_kv_heads)
    found = [read_scores(path) for path in paths]
    for path, values in zip(paths, found, strict=True):
        check_shape(path, values, (99, *grid) if suffix == ".npy" else grid)
    if suffix == ".npy":
        budgets = curves_to_budgets(paths[0], found[0])
        importance = torch.stack(list(budgets.values())).mean(dim=0)
    else:
        importance = torch.stack(found).amax(dim=0).clamp(0, 1)
        budgets = {ratio: retrieval_fractions(importance, ratio) for ratio in KEEP_RATIOS}
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    return HeadProfile(
        schema_version=1,
        model=fingerprint,
        provenance=Provenance(
            method=f"imported from {METHODS[suffix]}",
            texts=[f"{p.name} sha256:{digest}" for p, digest in zip(paths, digests, strict=True)],
            versions={"torch": torch.__version__, "vllm-kvzip": version("vllm-kvzip")},
            created=date.today().isoformat(),
        ),
        importance=importance.tolist(),
        budgets={str(ratio): values.tolist() for ratio, values in budgets.items()},
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Read scores and write the profile; returns the exit code.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called; None: the script's name.
    """
    parser = argparse.ArgumentParser(prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model the scores are for")
    parser.add_argument("--scores", required=True, type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="default: profiles/<model name>.json")
    args = parser.parse_args(argv)
    out = args.out or Path("profiles") / f"{Path(os.path.abspath(args.model)).name}.json"
    try:
        profile = build_profile(args.model, args.scores)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_profile(profile, out)
    except (ProfileError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}: {profile.provenance.method}")
    return 0
