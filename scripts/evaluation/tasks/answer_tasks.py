"""Long answers whose last lines depend on what their first lines said; for any model.

A small model does not write such an answer by itself. It is led through it instead, token by token,
as if it had written it. What counts is how likely the tokens are that repeat something said at the
beginning of the answer, thousands of tokens before.

    variables   values of variables are written down, then others change again and again; at the end
                the first ones are asked for
    arithmetic  intermediate results of a calculation, then many other steps; the last steps use the
                first results again
    lists       lists of words, then one list is changed word by word; at the end the first lists
                are written out again
    story       who hid what where, then a long text about something else; at the end it is told
                again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvzip.evaluation.tasks.text_source import DEFAULT_TEXT, split_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.random import Generator as Rng

    from vllm_kvzip.evaluation.tasks.text_frame import TextFrame

NUM_FACTS = 12  # of each answer
LIST_WORDS = 4
WORDS = (
    "amber", "anchor", "basket", "beacon", "candle", "carpet", "cedar", "copper", "coral", "cotton",
    "drum", "feather", "garden", "ginger", "hammer", "harbor", "honey", "iron", "ivory", "jacket",
    "kettle", "ladder", "lantern", "lemon", "maple", "marble", "mirror", "needle", "olive",
    "orchid",
    "paper", "pepper", "pocket", "ribbon", "river", "saddle", "salt", "silver", "spoon", "velvet",
    "violin", "walnut", "whistle", "willow", "window", "winter",
)  # fmt: skip
PEOPLE = (
    "Mara", "Tobias", "Ines", "Gregor", "Salma", "Pavel", "Nadia", "Oskar", "Lena", "Viktor",
    "Rosa", "Anton", "Clara", "Emil", "Greta", "Jonas",
)  # fmt: skip
THINGS = (
    "brass key", "blue letter", "silver coin", "old map", "red scarf", "gold ring", "glass bead",
    "tin whistle", "leather book", "ivory comb", "green bottle", "clay pipe", "iron nail",
    "silk glove", "wooden spoon", "copper lamp",
)  # fmt: skip
HIDING_PLACES = (
    "under the stone bridge", "behind the bakery oven", "inside the church organ",
    "below the garden stairs", "in the hollow oak tree", "above the stable door",
    "beside the village well", "between the cellar walls", "near the broken mill wheel",
    "in the captain's boat", "under the school roof", "behind the tall clock",
    "in the empty wine barrel", "below the market cross", "inside the blue teapot",
    "at the old railway station",
)  # fmt: skip

Piece = tuple[str, bool]  # a text, and whether its tokens are scored


@dataclass(frozen=True)
class LongAnswer:
    """A prompt, and the answer that a model is led through.

    Attributes:
        prompt: token ids.
        tokens: token ids of the answer.
        num_fact_tokens: its first tokens, which say what is repeated at its end.
        scored: places in ``tokens`` of those that repeat it.
    """

    prompt: list[int]
    tokens: list[int]
    num_fact_tokens: int
    scored: list[int]


@dataclass(frozen=True)
class _Parts:
    """What an answer is made of.

    Attributes:
        asked: the prompt.
        facts: a line for each fact.
        recalls: for each fact, pieces that repeat it; the scored ones stand in the fact as well.
        filler: endless lines in between.
    """

    asked: str
    facts: list[str]
    recalls: list[list[Piece]]
    filler: Iterator[str]


def make_answer(task: str, frame: TextFrame, rng: Rng, num_tokens: int) -> LongAnswer:
    """An answer of about ``num_tokens`` tokens, the same for the same state of ``rng``.

    Args:
        task: one of :data:`ANSWER_TASKS`.
        frame: tokenizer, and what it puts around a prompt; the tokenizer must know offsets.
        rng: draws names, numbers and their order.
        num_tokens: of the answer; it is shorter by less than a line.

    Raises:
        ValueError: if so few tokens hold only the lines that matter.
    """
    parts = ANSWER_TASKS[task](rng)
    order = rng.permutation(len(parts.facts)).tolist()
    last = [piece for place in order for piece in parts.recalls[place]]
    facts = frame.glue + "".join(parts.facts)
    left = num_tokens - len(frame.ids(facts)) - len(frame.ids("".join(text for text, _ in last)))
    if left < num_tokens // 2:
        raise ValueError(f"{num_tokens} tokens are too few for an answer of task {task}.")
    middle: list[str] = []
    while (left := left - len(frame.ids(line := next(parts.filler)))) > 0:
        middle.append(line)
    text, spans = facts + "".join(middle), []
    for piece, is_scored in last:
        if is_scored:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    found = frame.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = found["offset_mapping"]
    scored = [
        place
        for place, (begin, end) in enumerate(offsets)
        if any(map(str.isalnum, text[begin:end]))
        and any(low < end and begin < high for low, high in spans)
    ]
    prompt = [*frame.head_ids, *frame.ids(parts.asked + frame.before_answer)]
    num_fact_tokens = sum(begin < len(facts) for begin, _ in offsets)
    return LongAnswer(prompt, found["input_ids"], num_fact_tokens, scored)


def _variables(rng: Rng) -> _Parts:
    names = [str(name) for name in rng.permutation(WORDS)]
    values = [str(value) for value in rng.choice(range(100, 1000), NUM_FACTS, replace=False)]
    kept, busy = names[:NUM_FACTS], names[NUM_FACTS:]
    return _Parts(
        "Write down every variable and its value, and then each change, line by line.",
        [f"The value of {name} is {value}.\n" for name, value in zip(kept, values, strict=True)],
        [
            [(f"The value of {name} is ", False), (value, True), (".\n", False)]
            for name, value in zip(kept, values, strict=True)
        ],
        _changes(rng, busy),
    )


def _changes(rng: Rng, names: list[str]) -> Iterator[str]:
    while True:
        name, other = rng.choice(names, 2, replace=False)
        first, second = (int(number) for number in rng.integers(100, 500, 2))
        yield (
            f"Now add {second} to {name}, which was {first}, so {name} becomes {first + second} "
            f"and {other} stays as it was.\n"
        )


def _arithmetic(rng: Rng) -> _Parts:
    names = [str(name) for name in rng.permutation(WORDS)]
    numbers = rng.integers(11, 500, (NUM_FACTS, 3))
    facts, recalls = [], []
    for name, (first, second, more) in zip(names, numbers.tolist(), strict=False):
        total = first + second
        facts.append(f"The {name} sum is {first} + {second} = {total}.\n")
        recalls.append(
            [
                (f"The {name} sum was ", False),
                (str(total), True),
                (f", and with {more} more it is {total + more}.\n", False),
            ]
        )
    return _Parts(
        "Work out all the sums one after the other and write down each step.",
        facts,
        recalls,
        _steps(rng),
    )


def _steps(rng: Rng) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        first, second = (int(value) for value in rng.integers(11, 500, 2))
        yield f"Step {number}: take {first}, then add {second}, which makes {first + second}.\n"


def _lists(rng: Rng) -> _Parts:
    names = [str(name) for name in rng.permutation(PEOPLE)[:NUM_FACTS]]
    lists = [", ".join(rng.choice(WORDS, LIST_WORDS, replace=False)) for _ in names]
    return _Parts(
        "Write down everybody's list, then change your own list step by step.",
        [f"{name}'s list: {words}.\n" for name, words in zip(names, lists, strict=True)],
        [
            [(f"{name}'s list: ", False), (words, True), (".\n", False)]
            for name, words in zip(names, lists, strict=True)
        ],
        _list_changes(rng),
    )


def _list_changes(rng: Rng) -> Iterator[str]:
    mine = [str(word) for word in rng.choice(WORDS, LIST_WORDS, replace=False)]
    while True:
        new = str(rng.choice([word for word in WORDS if word not in mine]))
        gone = mine.pop(int(rng.integers(len(mine))))
        mine.append(new)
        yield f"I take out {gone} and put in {new}. My list is now: {', '.join(mine)}.\n"


def _story(rng: Rng) -> _Parts:
    facts, recalls = [], []
    drawn = [rng.permutation(names)[:NUM_FACTS] for names in (PEOPLE, THINGS, HIDING_PLACES)]
    for person, thing, place in zip(*drawn, strict=True):
        facts.append(f"{person} hid the {thing} {place}.\n")
        recalls.append([(f"{person} hid the {thing} ", False), (str(place), True), (".\n", False)])
    return _Parts(
        "Tell a long story about people who hide things. At its end say again who hid what where.",
        facts,
        recalls,
        _told(rng),
    )


def _told(rng: Rng) -> Iterator[str]:
    pieces = split_pieces(DEFAULT_TEXT.read_text(encoding="utf-8"))
    place = int(rng.integers(len(pieces)))
    while True:
        yield pieces[place % len(pieces)]
        place += 1


ANSWER_TASKS: dict[str, Callable[[Rng], _Parts]] = {
    "variables": _variables,
    "arithmetic": _arithmetic,
    "lists": _lists,
    "story": _story,
}
