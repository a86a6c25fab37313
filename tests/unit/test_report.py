"""The page that shows what was kept: its data, its passages, and what it refuses."""

import base64
import json
import re
from types import SimpleNamespace

import pytest
import torch

from vllm_kvzip.budgeting.kept_positions import KeptPositions, packed
from vllm_kvzip.command.report import main
from vllm_kvzip.core import CompressedPrefix, KeepPlan, PrefixPlan
from vllm_kvzip.errors import RequestError
from vllm_kvzip.report.bitmaps import pack, unpack
from vllm_kvzip.report.explanation import Explanation
from vllm_kvzip.report.page import make_page
from vllm_kvzip.report.passages import MOST, passage_starts
from vllm_kvzip.vllm_bridge.contexts.explain import check_explains
from vllm_kvzip.vllm_bridge.contexts.kept_records import MOST_RECORDS, KeptRecords
from vllm_kvzip.vllm_bridge.contexts.token_texts import token_texts

TEXTS = ["The", " ship", " sails", ".", "\n", " </script>", "<b>", " & ", "co", " end", " rest"]


def told_of(heads=((0, 1, 8), (0, 3)), quantized=((), ()), texts=TEXTS, tokens=10, **changes):
    """An answer about one layer of two heads."""
    tiers = [
        {"quantized": bool(number), "kept": base64.b64encode(pack(kept, tokens)).decode()}
        for number, kept in enumerate((heads, quantized))
    ]
    told = {
        "token_texts": list(texts), "compressed_tokens": tokens, "layers": [4], "kv_heads": 2,
        "tiers": tiers, "sink_tokens": 1, "recent_tokens": 1, "blocks_before": 4, "blocks_held": 1,
        "bytes_before": 4096, "bytes_held": 1024, "settings": {"scorer": "knorm", "mode": "evict"},
        "model": "/models/a-model", "versions": {"vllm": "0"}, "created": 0.0,
    }  # fmt: skip
    return {**told, **changes}


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 64, 1030])
def test_bits_come_back_as_they_were(tokens):
    torch.manual_seed(tokens)
    mask = torch.rand(3, 2, tokens) < 0.3
    heads = [head.nonzero().flatten().tolist() for head in mask.flatten(0, 1)]
    bits = packed(mask)
    assert bits == pack(heads, tokens)
    for number, kept in zip(unpack(bits, 6, tokens), heads, strict=True):
        assert [token for token in range(tokens) if number >> token & 1] == kept


@pytest.mark.parametrize(
    ("bits", "reason"),
    [(b"\x01\x00", "2 bytes, not 4"), (b"\x01\x00\x00\xf0", "behind the last of 10 tokens")],
)
def test_bits_of_other_shapes_are_refused(bits, reason):
    with pytest.raises(ValueError, match=reason):
        unpack(bits, 2, 10)


def prefix_of(sound):
    return CompressedPrefix((), sound=torch.tensor(sound))


def test_what_is_asked_for_is_recorded_and_nothing_else():
    records, plan = KeptRecords([4], 512, "knorm"), PrefixPlan(10, 5, 1, 10, 0.2)
    assert records.of("kvzip-explain-a-12345678", plan) is None
    for name in "abcdef"[: MOST_RECORDS + 1]:
        records.want(f"kvzip-explain-{name}")
    assert records.take("kvzip-explain-a") is None  # too many at once
    assert records.of("another", plan) is None
    kept = records.of("kvzip-explain-b-12345678", plan)
    kept.take([KeepPlan(torch.tensor([[0, 1], [3, 9]]), torch.tensor([[1, 1]]))], 0, 10)
    records.compressed("kvzip-explain-b-12345678", plan, prefix_of(True))
    found = records.take("kvzip-explain-b")
    assert found["tiers"] == [
        {"quantized": False, "kept": base64.b64encode(pack([[0, 1], [3, 9]], 10)).decode()}
    ]
    assert (found["layers"], found["kv_heads"], found["block_bytes"]) == ([4], 2, 512)
    assert records.take("kvzip-explain-b") is None
    records.of("kvzip-explain-c", plan)
    records.compressed("kvzip-explain-c", plan, prefix_of(False))
    assert records.take("kvzip-explain-c") is None  # numbers were not finite


def test_positions_are_followed_through_rounds():
    kept = KeptPositions()
    kept.take([KeepPlan(torch.tensor([[0, 1]]), torch.tensor([[1]]))], 0, 4)
    kept.take([KeepPlan(torch.tensor([[1, 3]]), torch.tensor([[1]]))], 4, 4)
    (mask,) = kept.masks(8)
    assert mask.nonzero()[:, 2].tolist() == [1, 5]  # of 0, 1 that were kept, then 4 to 7


class ByteTokenizer:
    """Tokens are bytes; as some tokenizers do, no space begins a text."""

    def decode(self, token_ids, skip_special_tokens):
        assert not skip_special_tokens
        return bytes(token_ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["a ship", "größer als 日本語", "a 👩‍👩‍👧 family", "x"])
def test_texts_of_tokens_are_the_text(text):
    ids = list(text.encode())
    found = token_texts(ByteTokenizer(), ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_bytes_of_no_character_end_somewhere():
    found = token_texts(ByteTokenizer(), [0xFF] * 30)
    assert len(found) == 30
    assert found[-1]


def test_passages_are_sentences_lines_and_parts_of_long_ones():
    words = [f" w{number}" for number in range(100)]
    texts = ["A", " sentence", " of", " more", " words", ".", " Short", ".", "\n", "Next", *words]
    starts = passage_starts(texts, 60)
    assert starts[:3] == [0, 6, 9]
    assert 60 in starts
    ends = [*starts[1:], len(texts)]
    assert max(end - start for start, end in zip(starts, ends, strict=True)) <= MOST
    assert passage_starts(["日", "本", "は", "島", "国", "だ", "。", "海"], 8) == [0, 7]
    assert passage_starts(["x"] * 200, 200)[:2] == [0, MOST + 8]


def test_the_page_has_everything_in_it_and_runs_nothing_of_the_document():
    page = make_page(Explanation.read(told_of()), "a </title><script>bad()</script>")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data)["tokens"] == TEXTS
    assert page.count("</script>") == 2
    assert "bad()</script>" not in page
    assert "/models/a-model" in page
    assert "25\u00a0% as they are, 75\u00a0% dropped" in page  # of both heads' ten tokens
    assert not re.findall(r"(?:src|href)=|url\(|https?://", page)


def test_shares_are_counted():
    found = Explanation.read(told_of(quantized=((2, 4), (9,))))
    assert found.shares == [0.5, 0.3]
    assert [found.share_of(tier) for tier in found.tiers] == [0.25, 0.15]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "'compressed_tokens' is missing"),
        (told_of(layers=[4, 5]), "4 bytes, not 8"),
        (told_of(quantized=((1,), ())), "keeps a token twice"),
        (told_of(texts=TEXTS[:9]), "10 tokens have 9 texts"),
    ],
)
def test_an_answer_that_is_none_is_refused(told, reason):
    with pytest.raises(ValueError, match=reason):
        Explanation.read(told)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe\x00", "is not UTF-8 text"), (b" \n", "is empty"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read_is_one_line(content, reason, tmp_path, capsys):
    file = tmp_path / "document"
    if content is not None:
        file.write_bytes(content)
    assert main([str(file), "--server", "http://127.0.0.1:9"], "vllm-kvzip report") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


@pytest.mark.parametrize(
    ("sizes", "engines", "reason"),
    [
        ({"tensor_parallel_size": 2}, 1, "with tensor_parallel_size 2 yet"),
        ({"pipeline_parallel_size": 3}, 1, "with pipeline_parallel_size 3 yet"),
        ({}, 2, "with data_parallel_size 2 yet"),
        ({"skip_tokenizer_init": True}, 1, "this server has no tokenizer"),
    ],
)
def test_servers_of_several_ranks_are_refused(sizes, engines, reason):
    names = [f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data")]
    parallel = SimpleNamespace(**{**dict.fromkeys(names, 1), **sizes})
    model = SimpleNamespace(skip_tokenizer_init=sizes.get("skip_tokenizer_init", False))
    config = SimpleNamespace(parallel_config=parallel, model_config=model)
    with pytest.raises(RequestError, match=reason):
        check_explains(config, engines)
