"""Head-budget profiles: which share of its KV pairs each head of one model should keep.

A profile is made offline (``scripts/profile_heads.py``) and is independent of any later context. It
says for a grid of keep ratios what share of its KV pairs each head keeps, averaged over calibration
contexts (head-level budgets of KVzip, arXiv 2505.23416). Its provenance names the method: the most
important heads keep everything, or one global ranking of KV pairs decides.
"""

from __future__ import annotations

import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvzip.errors import ProfileError

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Grid = list[list[Share]]


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

    ``repeated_share`` is the share of tokens that the model repeated right while it was watched.
    """

    method: str
    repeat_prompt: str | None = None
    scoring_chunk_tokens: int | None = Field(None, gt=0)
    num_contexts: int | None = Field(None, gt=0)
    context_tokens: int | None = Field(None, gt=0)
    repeated_share: Share | None = None
    texts: list[str]
    versions: dict[str, str]
    created: str


class HeadProfile(_Strict):
    """One ``profiles/<model>.json``.

    Attributes:
        schema_version: of this format.
        model: what it was made for.
        provenance: how.
        importance: ``[layers][KV heads]``, mean reconstruction score of a head's KV pairs.
        budgets: keep ratio -> ``[layers][KV heads]``, share of its KV pairs each head keeps.
    """

    schema_version: Literal[1]
    model: ModelFingerprint
    provenance: Provenance
    importance: Grid
    budgets: dict[str, Grid] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_shapes(self) -> HeadProfile:
        for name, grid in [("importance", self.importance), *self.budgets.items()]:
            if len(grid) != self.model.num_layers or any(
                len(row) != self.model.num_kv_heads for row in grid
            ):
                raise ValueError(
                    f"{name} must have {self.model.num_layers} rows of {self.model.num_kv_heads}"
                )
        for ratio in self.budgets:
            try:
                valid = 0 < float(ratio) <= 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"budgets has the key {ratio!r}, which is no ratio in (0, 1]")
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
            f"scripts/profile_heads.py or set profile to none."
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
            f"scripts/profile_heads.py."
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
            f"model's is {mine}; build one with scripts/profile_heads.py or set profile to none."
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
    values = profile.model_dump(mode="json")
    grids = {"importance": values.pop("importance"), "budgets": values.pop("budgets")}
    head = json.dumps(values, indent=2)[:-2]
    importance = _rows(grids["importance"], 2)
    budgets = ",\n".join(f'    "{key}": {_rows(grid, 4)}' for key, grid in grids["budgets"].items())
    text = f'{head},\n  "importance": {importance},\n  "budgets": {{\n{budgets}\n  }}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _rows(grid: Grid, indent: int) -> str:
    blank = " " * (indent + 2)
    rows = ",\n".join(blank + json.dumps([round(value, 4) for value in row]) for row in grid)
    return f"[\n{rows}\n{' ' * indent}]"
