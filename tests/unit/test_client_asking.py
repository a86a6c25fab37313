"""Drafts are looked up, checked and merged; the answers of the model are given here."""

import asyncio
from types import SimpleNamespace

import pytest

from vllm_kvzip.client import Document
from vllm_kvzip.client.asking.answers import Claim
from vllm_kvzip.client.asking.budget import Calls
from vllm_kvzip.client.asking.drafting import AskedPart, draft, look_up
from vllm_kvzip.client.asking.merging import MergeLimits, grouped, merge, most_telling
from vllm_kvzip.client.asking.prompts import says_not_found, split_question
from vllm_kvzip.client.asking.verification import assertion, verify
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.library import ReadPart
from vllm_kvzip.client.server import Reply
from vllm_kvzip.client.text.parts import Part
from vllm_kvzip.client.text.quotes import PassageIndex

FILLER = "The river rose all night and nobody in the town slept. "
TEXT = (
    f"{FILLER * 3}The gate code of the old mill is 4821. {FILLER}The licence number of the sugar "
    f"refinery is 7730. {FILLER * 2}Maria Rossi signed the treaty in Turin. {FILLER}"
)
QUESTION = "What is the gate code of the old mill?"
RIGHT = "The gate code of the old mill is 4821."


def asked(text=TEXT, number=0, start=0):
    document = Document("a document", " " * start + text)
    part = Part(number, start, start + len(text), text, 100)
    return AskedPart(number, ReadPart(document, part, {}, "id", 96, 3, 1))


def reply(text, is_whole=True, cached=96):
    return Reply(text, is_whole, 100, 5, cached, 0.1, None, None)


class Model:
    """Says what it is given, one after the other; remembers what it was asked."""

    def __init__(self, *texts):
        self.texts = list(texts)
        self.prompts = []
        self.openings = []

    async def chat(self, messages, *, max_tokens, send, opening=None):
        self.prompts.append(messages[0]["content"])
        self.openings.append(opening)
        text = self.texts.pop(0)
        return text if isinstance(text, Reply) else reply(text)


def calls_of(model, most=100):
    tally = SimpleNamespace(replies=[], parts_read_again=0)
    return Calls(model, tally, most), tally


def drafted(*texts, quoting="strict", question=QUESTION, part=None):
    model = Model(*texts)
    calls, _ = calls_of(model)
    return asyncio.run(draft(calls, part or asked(), question, quoting, 32)), model


def test_a_quote_is_the_passage_that_says_it_with_its_place():
    (claim,), _ = drafted("The gate code of the old mill is 4821", part=asked(start=7))
    assert claim.verdict == "quoted"
    assert claim.quote.text == RIGHT
    assert claim.quote.start == 7 + TEXT.index(RIGHT)
    assert claim.quote.end - claim.quote.start == len(RIGHT)


@pytest.mark.parametrize(
    "wrong",
    [
        "The gate code of the old mill is 4812.",  # another number
        "The gate code of the sugar refinery is 4821.",  # of something else
        "The gate code of the old mill is 7730.",  # a number that stands elsewhere
        "The key number of the old mill is 4821.",
        "Paris is the capital of France.",
        "4822",
    ],
)
def test_what_no_passage_says_is_rejected_and_says_why(wrong):
    (claim,), _ = drafted(wrong)
    assert (claim.verdict, claim.quote) == ("rejected", None)
    assert claim.reason == "No passage of the part says it."


def test_a_true_sentence_that_answers_another_question_is_rejected():
    (claim,), _ = drafted("The licence number of the sugar refinery is 7730.")
    assert claim.verdict == "rejected"
    assert claim.reason == "The passage that says it does not answer the question."


def test_other_spellings_of_a_word_are_the_same_word_but_not_of_a_number():
    index = PassageIndex(TEXT)
    assert index.support("The license number of the sugar refinery is 7730").is_enough
    assert index.support("The license number of the sugar refinery is 773").missing == ("773",)


def test_two_sentences_can_say_it_together():
    text = FILLER + "Maria Rossi came by train. She signed on 12 May. " + FILLER
    support = PassageIndex(text).support("Maria Rossi signed on 12 May.")
    assert support.is_enough
    assert text[support.start : support.end] == "Maria Rossi came by train. She signed on 12 May."


def test_another_script_is_quoted_too():
    text = "昨日は雨でした。契約は東京で署名された。田中さんは帰った。"
    support = PassageIndex(text).support("契約は東京で署名された")
    assert support.is_enough
    assert text[support.start : support.end] == "契約は東京で署名された。"
    assert not PassageIndex(text).support("契約は大阪で署名された").is_enough


@pytest.mark.parametrize("text", ["NOT FOUND", "The code of the mill is not found.", "", " \n"])
def test_the_model_may_say_that_it_is_not_there(text):
    claims, _ = drafted(text)
    assert claims == []
    assert says_not_found(text)


def test_a_paraphrase_counts_when_the_model_copies_a_sentence_that_stands_there():
    question, said = "Who put a name under it?", "It was Ms Rossi who put her name under it."
    (claim,), model = drafted(
        said, "Maria Rossi signed the treaty in Turin.", quoting="asked", question=question
    )
    assert (claim.verdict, claim.text) == ("quoted", said)
    assert claim.quote.text == "Maria Rossi signed the treaty in Turin."
    assert len(model.prompts) == 2
    (claim,), _ = drafted(said, "Maria Rossi tore up the treaty.", quoting="asked")
    assert claim.verdict == "rejected"
    (claim,), _ = drafted(said, quoting="strict", question=question)
    assert claim.verdict == "rejected"


def test_a_copied_sentence_must_hold_the_claims_numbers():
    (claim,), _ = drafted("Its gate opens with 9999.", RIGHT, quoting="asked")
    assert claim.verdict == "rejected"


def test_repeated_and_unfinished_sentences_are_dropped():
    claims, _ = drafted(reply(f"{RIGHT} {RIGHT.upper()} The gate code of", is_whole=False))
    assert [claim.text for claim in claims] == [RIGHT]
    claims, _ = drafted(reply("The gate code of the old mill is 4821", is_whole=False))
    assert len(claims) == 1


@pytest.mark.parametrize(
    ("claim", "asserted"),
    [
        (RIGHT, "4821"),
        ("The treaty was signed by Maria Rossi in spring.", "Maria Rossi"),
        ("The treaty was signed in springtime.", "springtime"),
        ("4821 it is.", None),
        ("It is so.", None),
    ],
)
def test_a_claim_is_cut_before_what_it_asserts(claim, asserted):
    cut = assertion(claim)
    assert (cut and claim[cut[0] : cut[1]]) == asserted


def verified(text, *said, quoting="strict", revisions=2, most=100):
    part, model = asked(), Model(*said)
    calls, _ = calls_of(model, most)
    claim = look_up(part, QUESTION, text, quoting)
    return asyncio.run(verify(calls, part, claim, quoting, revisions)), model


def test_a_claim_that_the_model_says_again_unseen_is_confirmed():
    claim, model = verified(RIGHT, "4821. And so on.")
    assert (claim.verdict, claim.quote.text) == ("confirmed", RIGHT)
    assert model.openings == ["The gate code of the old mill is"]
    assert "4821" not in model.prompts[0].replace(TEXT, "")  # its end is not shown to the model


def test_a_wrong_claim_is_revised_into_what_the_document_says():
    claim, _ = verified("The gate code of the old mill is 7730.", " 4821. The river")
    assert (claim.verdict, claim.text) == ("revised", RIGHT)
    assert claim.draft == "The gate code of the old mill is 7730."
    assert claim.quote.text == RIGHT


def test_the_second_revision_asks_for_the_sentence():
    claim, model = verified("The gate code of the old mill is 7730.", "1111.", RIGHT)
    assert (claim.verdict, claim.text, len(model.prompts)) == ("revised", RIGHT, 2)


def test_revisions_are_bounded_and_failures_have_a_reason():
    wrong = "The gate code of the old mill is 7730."
    claim, model = verified(wrong, "1111.", revisions=1)
    assert (claim.verdict, len(model.prompts)) == ("rejected", 1)
    claim, _ = verified(wrong, "1111.", "NOT FOUND", quoting="none")
    assert claim.verdict == "rejected"
    assert claim.reason.endswith("the model says: The gate code of the old mill is 1111.")


def test_what_no_passage_says_is_not_true_because_it_is_said_twice():
    claim, _ = verified("The gate code of the old mill is 7730.", "7730.")
    assert claim.verdict == "rejected"


def test_a_claim_without_anything_to_check_is_unverified_not_true():
    claim, _ = verified("It is so.", "NOT FOUND", quoting="none")
    assert (claim.verdict, bool(claim.reason)) == ("unverified", True)


def test_when_calls_run_out_a_claim_is_unverified():
    claim, _ = verified(RIGHT, most=0)
    assert claim.verdict == "unverified"
    assert claim.reason == "No call was left to check it."


def test_calls_are_counted_and_no_more_than_the_budget():
    calls, tally = calls_of(Model("a", "b", "c"), most=2)
    asyncio.run(calls.plain("x", 4))
    asyncio.run(calls.plain("x", 4))
    with pytest.raises(BudgetError, match="The budget of 2 calls is used up"):
        asyncio.run(calls.plain("x", 4))
    assert len(tally.replies) == 2


def test_an_answer_that_reused_less_than_the_context_had_it_read_again():
    calls, tally = calls_of(
        Model(reply("a", cached=96), reply("a", cached=95), reply("a", cached=None))
    )
    for _ in range(3):
        asyncio.run(calls.about(asked().part, "x", 4))
    assert tally.parts_read_again == 1


def claims_of(*texts, parts=None):
    parts = parts or [asked(number=number) for number in range(len(texts))]
    return [Claim(text, QUESTION, n, None, "quoted") for n, text in enumerate(texts)], parts


def merged(texts, *said, limits=None, most=100):
    model = Model(*said)
    calls, _ = calls_of(model, most)
    claims, _ = claims_of(*texts)
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


def test_of_true_claims_those_stay_that_answer_the_question_best():
    part = asked()
    best = look_up(part, QUESTION, RIGHT, "asked")
    other = look_up(part, QUESTION, "The licence number of the sugar refinery is 7730.", "asked")
    assert other.verdict == "quoted"
    kept, dropped = most_telling([other, best], [part], "strict")
    assert (kept, [claim.text for claim in dropped]) == ([best], [other.text])
    assert dropped[0].reason == "Another passage answers it better."
    assert most_telling([other, best], [part], "asked") == ([other, best], [])


def test_questions_behind_each_other_are_asked_one_by_one():
    assert split_question("Who? What is it?") == ["Who?", "What is it?"]
    assert split_question("  Tell me all ") == ["Tell me all"]
    wide = "\uff1f"  # of Chinese and Japanese
    assert split_question(f"東京ですか{wide}はい{wide}") == [f"東京ですか{wide}", f"はい{wide}"]
    assert split_question("Who? Answer in German.") == ["Who? Answer in German."]
    assert split_question("What is at http://a.b/?c=1?") == ["What is at http://a.b/?c=1?"]
    assert split_question(" ") == []
