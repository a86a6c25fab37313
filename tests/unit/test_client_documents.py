"""Files become text, text becomes parts, and nothing gets lost on the way."""

import asyncio
import sys

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pdf import pdf

from vllm_kvzip.client import Document, read_document
from vllm_kvzip.client.errors import DocumentError
from vllm_kvzip.client.text.parts import PartLimits, boundaries, split
from vllm_kvzip.client.text.words import sentences, words


async def count_words(text):
    return len(text.split())


async def count_letters(text):
    return len(text)


def parts_of(text, most, count=count_words, **limits):
    return asyncio.run(split("a document", text, count, PartLimits(most, **limits)))


def file(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", b"One line.\r\nAnother.\n", "One line.\r\nAnother.\n"),
        ("a.md", b"# Title\n\n* a\n", "# Title\n\n* a\n"),
        ("a.txt", "\ufeffGrüße".encode(), "Grüße"),
        ("a.txt", "Привет, мир".encode("utf-16"), "Привет, мир"),
        ("a.log", "契約は東京で".encode(), "契約は東京で"),
    ],
)
def test_text_files_are_read_as_they_are(tmp_path, name, data, text):
    assert read_document(file(tmp_path, name, data)).text == text


def test_html_is_what_a_browser_shows(tmp_path):
    page = (
        b"<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body><h1>Head</h1>"
        b"<p>One <b>bold</b>\n  word.</p><script>x()</script><ul><li>first<li>second</ul></body>"
    )
    assert read_document(file(tmp_path, "page", page)).text == (
        "Head\n\nOne bold\n word.\n\nfirst\n\nsecond"
    )


def test_cells_of_a_table_stand_apart_and_a_head_may_be_open(tmp_path):
    page = (
        b"<!doctype html><html><head><title>T</title><body><h1>Head</h1><table>"
        b"<tr><th>Year</th><th>Code</th></tr><tr><td>2019</td><td>4821</td></tr></table>"
    )
    text = read_document(file(tmp_path, "page.html", page)).text
    assert text == "Head\n\nYear | Code\n\n2019 | 4821"


def test_pdf_pages_have_numbers(tmp_path):
    path = file(tmp_path, "a.pdf", pdf(["The first page.", "The code is 4821."]))
    document = read_document(path)
    assert document.text == "The first page.\n\nThe code is 4821."
    assert document.page(0) == 1
    assert document.page(document.text.index("4821")) == 2
    assert Document("a", "b").page(0) is None


def test_half_a_character_of_a_pdf_is_replaced_and_elsewhere_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: "a \ud835 \ud835\udc00")
    document = read_document(file(tmp_path, "a.pdf", pdf(["x"])))
    assert document.text == "a \ufffd \U0001d400"
    assert document.digest
    with pytest.raises(DocumentError, match="holds half a character at 2"):
        Document("a", "b \ud835")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t", "is empty"),
        ("a.bin", bytes(range(256)), "is not text in UTF-8 (byte 128)"),
        ("a.bin", b"a\x00b", "is a binary file"),
        ("a.pdf", b"%PDF-1.4\nnothing", "cannot be read as PDF"),
        ("a.pdf", pdf([""]), "holds no text; are its pages pictures?"),
        ("a.html", b"<html><script>x</script></html>", "holds no text"),
    ],
)
def test_a_file_that_is_no_document_gets_a_sentence(tmp_path, name, data, sentence):
    with pytest.raises(DocumentError, match=r"^[^\n]+$") as refused:
        read_document(file(tmp_path, name, data))
    assert sentence in str(refused.value)


def test_a_missing_file_and_a_folder_get_a_sentence(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DocumentError, match="cannot be read"):
            read_document(path)


@pytest.mark.parametrize(("name", "package"), [("a.pdf", "pypdf"), ("a.html", "bs4")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DocumentError, match=r"pip install 'vllm-kvzip\[client\]'"):
        read_document(file(tmp_path, name, b"<p>text</p>"))


PARAGRAPHS = "\n\n".join(f"{n} " + "word " * (n % 7 + 3) + "end." for n in range(60))


def test_parts_end_with_paragraphs_and_are_about_equal():
    parts = parts_of(PARAGRAPHS, 100)
    assert len(parts) >= 5
    assert all(part.text.endswith("end.") and part.text[0].isdigit() for part in parts)
    assert max(part.tokens for part in parts) <= 100
    assert min(part.tokens for part in parts) >= 50
    assert [part.number for part in parts] == list(range(len(parts)))


def test_of_several_paragraph_ends_the_one_nearest_a_blocks_edge_is_taken():
    text = "\n\n".join(["a b c d"] * 40)  # paragraphs of 4
    plain = parts_of(text, 42)
    aligned = parts_of(text, 42, block_size=16, head_tokens=12)
    assert (plain[0].tokens + 12) % 16 != 0
    assert (aligned[0].tokens + 12) % 16 == 0


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("aaaa bbbb.\n\ncccc dddd eee", 12),
        ("aaaa bbbb.\ncccc dddd eee", 11),
        ("aaaa bbbb. Cccc dddd eee", 11),
        ("aaaa bbbb cccc dddd eeee", 20),
        ("aaaabbbbccccddddeeeeffff", 24),
    ],
)
def test_a_part_ends_where_a_reader_would_stop(text, end):
    high = len(text) if end > 12 else 14
    assert boundaries(text, 0, high)[0] == end


@settings(max_examples=60)
@given(
    st.text(st.sampled_from("ab .\n\u6771\u00df"), min_size=1, max_size=400).filter(str.strip),
    st.integers(1, 40),
)
def test_parts_hold_the_whole_text_once_and_in_order(text, most):
    parts = parts_of(text, most, count_letters, most_parts=10**6)
    assert all(part.tokens <= most for part in parts)
    assert all(text[part.start : part.end] == part.text == part.text.strip() for part in parts)
    ends = [0, *(part.end for part in parts)]
    starts = [*(part.start for part in parts), len(text)]
    gaps = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    assert not "".join(gaps).strip()


def test_ten_megabytes_are_refused_before_much_is_counted():
    counted = []

    async def count(text):
        counted.append(len(text))
        return len(text) // 4

    with pytest.raises(DocumentError, match=r"2,500,000 tokens \(estimated\), more than 64 parts"):
        asyncio.run(split("a", "word " * 2_000_000, count, PartLimits(4000, most_parts=64)))
    assert sum(counted) < 1_500_000


def test_words_of_any_script():
    assert [word.form for word in words("Die Straße, 1,234.5 kg")] == [
        "die", "strasse", "1,234.5", "kg",
    ]  # fmt: skip
    assert [word.form for word in words("東京 RFC2119")] == ["東", "京", "rfc2119"]
    assert [word.is_number for word in words("a1 b")] == [True, False]


def test_sentences_of_any_script():
    text = "One. Two 3.5 is\nit! 東京です。はい\n\nTitle\n\n***"
    found = [text[begin:end] for begin, end in sentences(text)]
    assert found == ["One.", "Two 3.5 is\nit!", "東京です。", "はい", "Title"]


@pytest.mark.parametrize(
    "text",
    [
        "The treaty was signed by Dr. Smith.|He left.",
        "It stands at No. 12.|It is old.",
        "He said no.|Then he left.",
        "By J. R. Smith, e.g. of the U.S. Army.|Then more.",
        "1. Put it in.|Then take it out.",
        "It was 1902.|The king came.",
        "See pp. 4 and Fig. 3.|The end.",
    ],
)
def test_the_full_stop_of_an_abbreviation_ends_no_sentence(text):
    plain = text.replace("|", " ")
    assert [plain[begin:end] for begin, end in sentences(plain)] == text.split("|")
