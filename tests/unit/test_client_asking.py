"""Drafts are looked up, checked and merged; the answers of the model are given here."""

import asyncio

import pytest
from given_answers import FILLER, QUESTION, RIGHT, TEXT, Model, asked, calls_of, reply

from vllm_kvzip.client.asking.drafting import NO_CALL, draft, look_up
from vllm_kvzip.client.asking.merging import most_telling
from vllm_kvzip.client.asking.prompts import says_not_found, split_question
from vllm_kvzip.client.asking.verification import assertion, verify
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.text.quotes import PassageIndex


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


@pytest.mark.parametrize(
    ("said", "copied"),
    [
        ("Its gate opens with 9999.", RIGHT),  # another number
        ("It was John Miller who signed it.", "Maria Rossi signed the treaty in Turin."),
        ("It was signed on a train.", FILLER),  # about something else
        ("Nobody knows it.", "NOT FOUND"),
    ],
)
def test_a_copied_sentence_must_be_about_the_claim(said, copied):
    question = "Who signed the treaty of the old mill?"
    (claim,), _ = drafted(said, copied, quoting="asked", question=question)
    assert claim.verdict == "rejected"


def test_what_was_not_found_may_stand_in_the_text():
    text = f"{FILLER}The wreck of the ship was not found until 1985. {FILLER}"
    said = "The wreck of the ship was not found until 1985."
    question = "When was the wreck of the ship found?"
    for quoting in ("strict", "asked"):
        (claim,), _ = drafted(said, quoting=quoting, question=question, part=asked(text))
        assert claim.verdict == "quoted"
    claims, _ = drafted("NOT FOUND.", part=asked(f"{FILLER}Error 404: not found. {FILLER}"))
    assert claims == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It was signed by Dr. Smith in 1902.", "It was signed by Dr. Smith in 1902."),
        ("Jose\u0301 Nu\u0301n\u0303ez signed it.", "Jos\xe9 N\xfa\xf1ez signed it."),
        ("It fell to -500 in spring.", "It fell to \u2212500 in spring."),
    ],
)  # fmt: skip
def test_a_sentence_is_one_claim_however_it_is_written(text, said):
    (claim,), _ = drafted(said, quoting="asked", question="Who, what?", part=asked(FILLER + text))
    assert (claim.verdict, claim.quote.text) == ("quoted", text)


def test_a_sign_makes_another_number_and_neighbours_do_not_lend_theirs():
    index = PassageIndex(f"{FILLER}It fell to -500 in spring. {FILLER * 2}")
    assert index.support("It fell to 500 in spring.").missing == ("500",)
    old, new = RIGHT, "The gate code of the new mill is 7730."
    index = PassageIndex(f"{FILLER * 3}{old} {new} {FILLER * 3}")
    assert index.support(old).is_enough
    assert index.support(new).is_enough
    assert not index.support("The gate code of the old mill is 7730.").is_enough
    assert not index.support("The gate code of the new mill is 4821.").is_enough


def test_calls_for_quotes_leave_those_that_every_part_needs():
    calls, tally = calls_of(Model("It is unknown.", "NOT FOUND", *["It is unknown."] * 2), 4, 3)

    async def each():
        return [await draft(calls, asked(number=n), QUESTION, "asked", 32) for n in range(3)]

    found = [claim for claims in asyncio.run(each()) for claim in claims]
    assert len(tally.replies) == 4
    assert [claim.verdict for claim in found] == ["rejected"] * 3
    assert [claim.reason for claim in found].count(NO_CALL) == 2


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
