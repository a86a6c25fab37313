"""Calibration contexts: disjoint, of several kinds, the same for the same seed."""

import pytest
from engine_job import MODEL
from transformers import AutoTokenizer

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.calibration import Material, calibration_contexts, default_material


class Letters:
    """A tokenizer with one token a letter."""

    bos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


class Chat(Letters):
    def apply_chat_template(self, messages, **options):
        return f"[user]{messages[0]['content']}[assistant]"


MATERIAL = [
    Material("own", "a" * 45),
    Material("manual", "".join(chr(1000 + n) for n in range(105))),
    Material("code", "c" * 12),
]


def test_contexts_are_disjoint_and_of_all_kinds():
    contexts = calibration_contexts(Letters(), MATERIAL, num_contexts=8, context_tokens=10)
    assert [len(context) for context in contexts] == [10] * 8
    manual = [token for context in contexts for token in context if token >= 1000]
    assert len(manual) == len(set(manual)) >= 40
    assert any(context == [ord("c")] * 10 for context in contexts)
    assert any(context == [ord("a")] * 10 for context in contexts)


def test_the_seed_decides():
    first, again, other = (
        calibration_contexts(Letters(), MATERIAL, 8, 10, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_they_overlap_when_the_material_is_used_up():
    contexts = calibration_contexts(Letters(), MATERIAL, num_contexts=40, context_tokens=10)
    assert len(contexts) == 40
    assert {len(context) for context in contexts} == {10}


def test_files_of_the_user_all_take_turns_whatever_they_are_called():
    files = [Material("code", "c" * 500), Material("notes.txt", "n" * 500)]
    contexts = calibration_contexts(Letters(), files, num_contexts=4, context_tokens=10)
    assert [chr(context[0]) for context in contexts] == ["c", "n", "c", "n"]


def test_they_begin_as_a_chat_does():
    contexts = calibration_contexts(Chat(), MATERIAL, num_contexts=2, context_tokens=30)
    assert all("".join(map(chr, context)).startswith("[user]") for context in contexts)
    assert {len(context) for context in contexts} == {30}


def test_texts_that_are_too_short_are_joined_or_refused():
    short = [Material("a", "a" * 6), Material("b", "b" * 6)]
    (context,) = calibration_contexts(Letters(), short, num_contexts=1, context_tokens=12)
    assert sorted(context) == [ord("a")] * 6 + [ord("b")] * 6
    with pytest.raises(ProfileError, match="has 12 tokens, fewer than the 13 that a context needs"):
        calibration_contexts(Letters(), short, num_contexts=1, context_tokens=13)


def test_what_ships_is_enough_for_the_defaults():
    material = default_material()
    contexts = calibration_contexts(AutoTokenizer.from_pretrained(MODEL), material)
    assert (len(contexts), {len(context) for context in contexts}) == (12, {1024})
    assert all("sha256:" in part.label for part in material)
    assert "海边的邮局" in material[0].text
