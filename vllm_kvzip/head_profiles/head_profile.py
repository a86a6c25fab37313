"""Head-budget profiles: which share of its KV pairs each head of one model should keep.

A profile is made offline (``vllm-kvzip profile``) and is independent of any later context. It
says for a grid of keep ratios what share of its KV pairs each head keeps, averaged over calibration
contexts (head-level budgets of KVzip, arXiv 2505.23416). Its provenance names the method: the most
important heads keep everything, or one global ranking of KV pairs decides.
"""

from __future__ import annotations

import json
import logging
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvzip.errors import ProfileError

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Grid = list[list[Share]]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFingerprint(_Strict):
    """What a profile must share with a model; ``name`` is for people."""

    architecture: str
    num_layers: int = Field(gt=0)
    num_query_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    name: str = ""

    def mismatch(self, other: ModelFingerprint) -> tuple[str, Any, Any] | None:
        """The first field that differs with both values, ``name`` aside."""
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if field != "name" and mine != theirs:
                return field, mine, theirs
        return None


class Provenance(_Strict):
    """How a profile was made; an imported one does not say how its scores came about.

    ``repeat_prompt`` and ``later_repeat_prompt`` asked for the first chunk of a context and for the
    others, word for word, turns of a chat included. ``repeated_share`` is the share of tokens that
    the model repeated right while it was watched. ``following_tokens`` followed each context in the
    same text, for what networks learned of influence further on.
    """

    method: str
    repeat_prompt: str | None = None
    later_repeat_prompt: str | None = None
    scoring_chunk_tokens: int | None = Field(None, gt=0)
    num_contexts: int | None = Field(None, gt=0)
    context_tokens: int | None = Field(None, gt=0)
    following_tokens: int | None = Field(None, gt=0)
    repeated_share: Share | None = None
    texts: list[str]
    versions: dict[str, str]
    created: str


class TierBudgets(_Strict):
    """Which share of its KV pairs each head keeps as they are, and which in either tier.

    Attributes:
        key_format, value_format: of the quantized tier they were made for.
        token_bytes: bytes of a quantized KV pair / of one as it is.
        loss: share of its worth that a pair was taken to lose when it is quantized.
        full, kept: bytes ratio -> ``[layers][KV heads]``; ``kept`` includes ``full``.
    """

    key_format: str
    value_format: str
    token_bytes: float = Field(gt=0, lt=1)
    loss: float = Field(gt=0, lt=1)
    full: dict[str, Grid] = Field(min_length=1)
    kept: dict[str, Grid] = Field(min_length=1)

    def shares(self) -> list[tuple[float, float, float]]:
        """For each bytes ratio, ascending: itself, mean share kept, share of the bytes for full."""
        points = []
        for ratio in sorted(self.full, key=float):
            full, kept = (_mean(grids[ratio]) for grids in (self.full, self.kept))
            held = full + (kept - full) * self.token_bytes
            points.append((float(ratio), kept, full / held if held else 0.0))
        return points


class QualityCurve(_Strict):
    """How many nats a token it costs to drop KV pairs of a worth, for one scorer.

    Attributes:
        power: of the scores that a worth is made of.
        points: (worth, nats a token), both rising; see ``budgeting/quality.py``.
        num_contexts: how many were measured.
        rank_correlation: of estimated and measured losses, of contexts that were left out.
    """

    power: float = Field(gt=0)
    points: list[tuple[Positive, Positive]] = Field(min_length=2)
    num_contexts: int = Field(gt=0)
    rank_correlation: float = Field(ge=-1, le=1)

    @model_validator(mode="after")
    def _check_rising(self) -> QualityCurve:
        for before, after in pairwise(self.points):
            if before[0] >= after[0] or before[1] >= after[1]:
                raise ValueError("points must rise")
        return self


class HeadProfile(_Strict):
    """One ``profiles/<model>.json``.

    Attributes:
        schema_version: of this format.
        model: what it was made for.
        provenance: how.
        importance: ``[layers][KV heads]``, mean reconstruction score of a head's KV pairs.
        budgets: keep ratio -> ``[layers][KV heads]``, share of its KV pairs each head keeps.
        tiers: the same for mode ``mixed``, by bytes; None when it was made without.
        quality: scorer -> what its scores tell of the loss; None when it was made without.
    """

    schema_version: Literal[1]
    model: ModelFingerprint
    provenance: Provenance
    importance: Grid
    budgets: dict[str, Grid] = Field(min_length=1)
    tiers: TierBudgets | None = None
    quality: dict[str, QualityCurve] | None = None

    @model_validator(mode="after")
    def _check_shapes(self) -> HeadProfile:
        tables = {"budgets": self.budgets}
        if self.tiers is not None:
            tables |= {"tiers.full": self.tiers.full, "tiers.kept": self.tiers.kept}
            if self.tiers.full.keys() != self.tiers.kept.keys():
                raise ValueError("tiers must have the same ratios in full and kept")
        grids = [(f"{name} at {r}", g) for name, table in tables.items() for r, g in table.items()]
        for name, grid in [("importance", self.importance), *grids]:
            if len(grid) != self.model.num_layers or any(
                len(row) != self.model.num_kv_heads for row in grid
            ):
                raise ValueError(
                    f"{name} must have {self.model.num_layers} rows of {self.model.num_kv_heads}"
                )
        for name, ratio in ((name, ratio) for name, table in tables.items() for ratio in table):
            try:
                valid = 0 < float(ratio) <= 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"{name} has the key {ratio!r}, which is no ratio in (0, 1]")
        return self

    def fractions(self, keep_ratio: float) -> list[list[float]]:
        """Share of its KV pairs each head keeps, ``[layers][KV heads]``.

        See :func:`interpolate`.
        """
        return interpolate(self.budgets, keep_ratio)


def interpolate(budgets: Mapping[str, Grid], keep_ratio: float) -> Grid:
    """Share of its KV pairs each head keeps, ``[layers][KV heads]``, at any keep ratio.

    Linear between the ratios of ``budgets``, with nothing kept at 0 and all at 1.
    """
    grids = {float(key): grid for key, grid in budgets.items()}
    rows = next(iter(grids.values()))
    points = {0.0: [[0.0] * len(row) for row in rows], 1.0: [[1.0] * len(row) for row in rows]}
    points.update(grids)
    below = max(ratio for ratio in points if ratio <= keep_ratio)
    above = min(ratio for ratio in points if ratio >= keep_ratio)
    weight = 0.0 if above == below else (keep_ratio - below) / (above - below)
    return [
        [low + weight * (high - low) for low, high in zip(lows, highs, strict=True)]
        for lows, highs in zip(points[below], points[above], strict=True)
    ]


def load_profile(path: Path) -> HeadProfile:
    """Read a profile.

    Raises:
        ProfileError: if the file is missing, is no JSON, or breaks the schema (names the field).
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(
            f"Head profile {path} cannot be read ({error.strerror}); build it with "
            f"`vllm-kvzip profile` or set profile to none."
        ) from error
    except ValueError as error:
        raise ProfileError(f"Head profile {path} is not JSON ({error}); build it again.") from error
    try:
        return HeadProfile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise ProfileError(
            f"Head profile {path} is broken at {field}: {message}; build it again with "
            f"`vllm-kvzip profile`."
        ) from error


def check_matches(profile: HeadProfile, running: ModelFingerprint, path: Path) -> None:
    """Refuse a profile of another model.

    Raises:
        ProfileError: names the first field that differs and both values.
    """
    if difference := profile.model.mismatch(running):
        field, theirs, mine = difference
        raise ProfileError(
            f"Head profile {path} was made for another model: its {field} is {theirs}, the running "
            f"model's is {mine}; build one with `vllm-kvzip profile` or set profile to none."
        )


def profile_folders() -> list[Path]:
    """Where ``profile: auto`` looks: ``./profiles``, then the profiles shipped with the package."""
    return [Path("profiles"), Path(str(files("vllm_kvzip.profiles")))]


def find_profile(running: ModelFingerprint, folders: list[Path]) -> Path | None:
    """The profile that matches a model, or None.

    Several can match (a base model and its fine-tunes): the one of the same name wins, then the
    first by file name. A file that cannot be read is passed over with a warning.
    """
    matches: list[tuple[bool, Path]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            profile = load_profile(path)
        except ProfileError as error:
            logger.warning("%s It is passed over.", error)
            continue
        if profile.model.mismatch(running) is None:
            matches.append((profile.model.name == running.name, path))
    named = [path for same_name, path in matches if same_name]
    candidates = named or [path for _, path in matches]
    return candidates[0] if candidates else None


def save_profile(profile: HeadProfile, path: Path) -> None:
    """Write a profile with one layer a line, so that differences can be read."""
    text = _text(profile.model_dump(mode="json", exclude_none=True), 0) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _text(value: Any, indent: int) -> str:
    """JSON in which a grid has one row a line."""
    blank = " " * (indent + 2)
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_text(part, indent + 2)}" for key, part in value.items()]
        return "{\n" + ",\n".join(blank + item for item in items) + f"\n{' ' * indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        rows = [json.dumps([_short(number) for number in row]) for row in value]
        return "[\n" + ",\n".join(blank + row for row in rows) + f"\n{' ' * indent}]"
    return json.dumps(value)


def _short(number: float) -> float:
    """Four decimals, or three digits where that is more."""
    return round(number, 4) if number >= 0.1 else float(f"{number:.3g}")


def _mean(grid: Grid) -> float:
    return sum(map(sum, grid)) / sum(map(len, grid))
