"""Contexts on which a model is watched while its head profile is made.

The material ships with the package (prose, letters, tables, logs, code, five languages) and comes
with every Python (the texts behind ``help()``, sources of the standard library). Contexts are cut
so that no two share a token as long as the material lasts, and begin as the model's prompts do.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.repeat_prompt import around_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NUM_CONTEXTS = 12
CONTEXT_TOKENS = 1024
KEEP_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""For which a profile says what each head keeps."""
MIN_REPEATED_SHARE = 0.5
"""Below it a model does not understand that it is to repeat, and its profile is worthless."""
NETWORK_TOKENS = 2048
"""Of each context, for training; the features of 16 contexts of an 8B model take 4 GiB."""
NETWORK_WIDTH = 16
OWN, OWN_TEXT = "own", "calibration.txt"
CODE_MODULES = ("argparse", "calendar", "csv", "heapq", "json.decoder", "statistics", "textwrap")
ORDER = (OWN, "manual", "code", "manual")
"""Kinds of material, in turns; one that is used up is passed over."""


@dataclass(frozen=True)
class Material:
    """One kind of text.

    Attributes:
        kind: its name.
        text: all of it.
    """

    kind: str
    text: str

    @property
    def label(self) -> str:
        """Its kind with a digest of the text, for a profile's provenance."""
        return f"{self.kind} sha256:{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"


def default_material() -> list[Material]:
    """The package's text, Python's documentation and sources, as far as this Python has them."""
    own = files("vllm_kvzip.profiles").joinpath(OWN_TEXT).read_text(encoding="utf-8")
    found = [Material(OWN, own)]
    for kind, text in (("manual", _manual()), ("code", _sources())):
        if text:
            found.append(Material(kind, text))
    return found


def read_material(paths: Sequence[Path]) -> list[Material]:
    """Text files of the user.

    Raises:
        ProfileError: if one cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(Material(str(path), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"Calibration text {path} cannot be read ({error}).") from error
    return found


def calibration_contexts(
    tokenizer: Any,
    material: Sequence[Material],
    num_contexts: int = NUM_CONTEXTS,
    context_tokens: int = CONTEXT_TOKENS,
    seed: int = 0,
) -> list[list[int]]:
    """Contexts of the kinds in turns, the same ones for the same seed.

    When all material is used up, further contexts begin anywhere and overlap.

    Args:
        tokenizer: has ``encode``; its chat template decides how a context begins.
        material: what is cut.
        num_contexts: how many.
        context_tokens: length of each.
        seed: of the order and of the places.

    Returns:
        token ids, ``[num_contexts][context_tokens]``.

    Raises:
        ProfileError: if no material is long enough for one context.
    """
    rng = random.Random(seed)
    head = _head(tokenizer)
    if len(head) > context_tokens // 2:
        head = []
    room = context_tokens - len(head)
    streams = {
        part.kind: list(tokenizer.encode(part.text, add_special_tokens=False)) for part in material
    }
    long_enough = {kind: ids for kind, ids in streams.items() if len(ids) >= room}
    if not long_enough:
        together = [token for ids in streams.values() for token in ids]
        long_enough = {"all": together}
        if len(together) < room:
            raise ProfileError(
                f"The calibration text has {len(together)} tokens, fewer than the {room} that a "
                f"context needs; name longer texts, or take shorter contexts."
            )
    unused = {kind: _windows(len(ids), room, rng) for kind, ids in long_enough.items()}
    known = set(long_enough) <= set(ORDER)  # a user's files are called anything
    turns = [kind for kind in ORDER if kind in long_enough] if known else list(long_enough)
    contexts: list[list[int]] = []
    while len(contexts) < num_contexts:
        kind = turns[len(contexts) % len(turns)]
        if not unused[kind]:
            kind = max(unused, key=lambda name: len(unused[name]))
        ids = long_enough[kind]
        start = unused[kind].pop() if unused[kind] else rng.randint(0, len(ids) - room)
        contexts.append([*head, *ids[start : start + room]])
    return contexts


def _windows(num_tokens: int, room: int, rng: random.Random) -> list[int]:
    """Where disjoint windows begin, spread over all tokens, in random order."""
    count = num_tokens // room
    gap = (num_tokens - count * room) // count
    starts = [number * (room + gap) for number in range(count)]
    rng.shuffle(starts)
    return starts


def _head(tokenizer: Any) -> list[int]:
    """What stands before a user's first word: a chat's head, or the token that begins a text."""
    before, _ = around_message(tokenizer)
    if before:
        return list(tokenizer.encode(before, add_special_tokens=False))
    begin = getattr(tokenizer, "bos_token_id", None)
    encoded = list(tokenizer.encode("a", add_special_tokens=True))
    return [begin] if begin is not None and encoded[:1] == [begin] else []


def _manual() -> str:
    """Python's language reference as plain text; empty where it is not installed."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return ""
    return "\n\n".join(text for _, text in sorted(topics.items()))


def _sources() -> str:
    """Sources of some modules of the standard library; those without a source are left out."""
    import inspect

    found = []
    for name in CODE_MODULES:
        try:
            found.append(inspect.getsource(importlib.import_module(name)))
        except (ImportError, OSError):
            continue
    return "\n\n".join(found)
