"""Claims of several parts become one answer; the answers of the model are given here."""

import asyncio
from dataclasses import replace

from given_answers import QUESTION, RIGHT, Model, asked, calls_of

from vllm_kvzip.client.asking.answers import Claim, Quote
from vllm_kvzip.client.asking.merging import MergeLimits, grouped, merge, sources_of


def claims_of(*texts, parts=None):
    parts = parts or [asked(number=number) for number in range(len(texts))]
    quotes = [Quote("a document", n, 0, len(text), text) for n, text in enumerate(texts)]
    return [Claim(q.text, QUESTION, n, q, "quoted") for n, q in enumerate(quotes)], parts


def merged(texts, *said, limits=None, most=100, verdicts=()):
    model = Model(*said)
    calls, _ = calls_of(model, most)
    claims, _ = claims_of(*texts)
    claims = [replace(c, verdict=v) for c, v in zip(claims, verdicts, strict=False)] or claims
    return asyncio.run(merge(calls, QUESTION, claims, limits or MergeLimits())), model


def test_one_claim_needs_no_call_and_equal_ones_are_one():
    found, model = merged([RIGHT, RIGHT.lower(), RIGHT])
    assert ([claim.text for claim in found.claims], found.calls) == ([RIGHT], 0)
    assert model.prompts == []
    assert merged([])[0].claims == []


def test_partial_answers_are_merged_and_keep_their_quotes():
    texts = ["Rossi signed it.", "It was signed in 1902."]
    found, model = merged(texts, "It was signed in 1902.")
    assert [(claim.text, claim.part) for claim in found.claims] == [(texts[1], 1)]
    assert (found.calls, found.depth) == (1, 1)
    assert all(text in model.prompts[0] for text in texts)


def test_a_merged_answer_that_says_something_else_is_dropped_visibly():
    texts = ["Rossi signed it.", "It was signed in 1902."]
    for said in ("It was signed in 1999.", "NOT FOUND"):
        found, _ = merged(texts, said)
        assert [claim.text for claim in found.claims] == texts
        assert "did not keep to their notes" in found.notes[0]


def test_merged_sentences_keep_facts_with_their_notes():
    texts = ["Anna was born in 1902.", "Boris was born in 1910."]
    found, _ = merged(texts, "Anna was born in 1902, and Boris in 1910.")
    (claim,) = found.claims
    assert [quote.text for quote in (claim.quote, *claim.more_quotes)] == texts
    for said in (
        "Anna was born in 1910. Boris was born in 1902.",
        "Anna was born in 1910, and Boris in 1902.",
        "Anna and Boris were born in 1902 and 1910.",
    ):
        found, _ = merged(texts, said)
        assert [claim.text for claim in found.claims] == texts
        assert "did not keep to their notes" in found.notes[0]


def test_short_names_are_not_swapped_either():
    texts = ["Al was born in 1902.", "Bo was born in 1910."]
    assert sources_of("Bo was born in 1910.", texts) == [1]
    assert sources_of("Al was born in 1902, and Bo in 1910.", texts) == [0, 1]
    assert sources_of("Al was born in 1910.", texts) == []


def test_what_a_merged_answer_leaves_out_is_told_and_it_is_as_well_checked_as_its_notes():
    texts = ["Anna was born in 1902.", "Boris was born in 1910."]
    found, _ = merged(texts, "Anna was born in 1902.")
    assert [claim.text for claim in found.claims] == texts[:1]
    (left,) = found.left_out
    assert (left.text, left.verdict) == (texts[1], "rejected")
    assert left.reason == "The merged answer leaves it out."
    both = "Anna was born in 1902, and Boris was born in 1910."
    for verdicts, verdict in (
        (["confirmed", "confirmed"], "confirmed"),
        (["confirmed", "quoted"], "quoted"),
        (["unverified", "confirmed"], "unverified"),
    ):
        found, _ = merged(texts, both, verdicts=verdicts)
        assert [claim.verdict for claim in found.claims] == [verdict]


def test_merging_goes_on_until_one_call_holds_all():
    names = ["Anna", "Boris", "Clara", "David", "Edith", "Frank", "Greta", "Hanna"]
    texts = [f"{name} signed it." for name in names]
    pairs = [f"{texts[n]} {texts[n + 1]}".replace("it. ", "it, and ") for n in range(0, 8, 2)]
    fours = [f"{pairs[0][:-1]}, and {pairs[1]}", f"{pairs[2][:-1]}, and {pairs[3]}"]
    whole = f"{fours[0][:-1]}, and {fours[1]}"
    found, _ = merged(texts, *pairs, *fours, whole, limits=MergeLimits(fan_in=2))
    assert found.notes == []
    assert (found.calls, found.depth) == (7, 3)
    assert [claim.text for claim in found.claims] == [whole]


def test_merging_stops_at_its_depth_and_at_the_budget_and_says_so():
    texts = [f"Person{n} signed it." for n in range(4)]
    found, _ = merged(texts, *texts[::2], limits=MergeLimits(fan_in=2, most_depth=1))
    assert found.depth == 1
    assert "After 1 merges 2 partial answers are left" in found.notes[0]
    found, _ = merged(texts, most=0)
    assert [claim.text for claim in found.claims] == texts
    assert "The budget of 0 calls is used up." in found.notes[0]


def test_groups_keep_to_both_limits():
    claims, _ = claims_of(*["x" * 10] * 7)
    assert [len(group) for group in grouped(claims, MergeLimits(fan_in=3))] == [3, 3, 1]
    assert [len(group) for group in grouped(claims, MergeLimits(most_characters=20))] == [
        2,
        2,
        2,
        1,
    ]
    assert [len(group) for group in grouped(claims, MergeLimits(most_characters=1))] == [1] * 7
