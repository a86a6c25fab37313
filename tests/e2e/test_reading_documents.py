"""The client reads and asks documents of a real server with a real language model."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
from faulty_proxy import DROP, FaultyProxy

from vllm_kvzip.client import (
    AsyncContextLibrary,
    AsyncReader,
    ClientError,
    ContextLibrary,
    Document,
    Reader,
    Retries,
    Server,
)
from vllm_kvzip.client.errors import BudgetError, DocumentError, QuestionError, ServerError
from vllm_kvzip.command.main import main
from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.text_source import DEFAULT_TEXT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PART_TOKENS, NUM_BLOCKS = 600, 120
FACT = "The gate code of the old mill is 4821."
QUESTION = "What is the gate code of the old mill?"
ABSENT = "What is the key number of the brewery?"
QUICK = Retries(most=3, first_pause_seconds=0.05, timeout_seconds=60)


def prose(begin, end):
    """Paragraphs of a text that ships."""
    return "\n\n".join(DEFAULT_TEXT.read_text(encoding="utf-8").split("\n\n")[begin:end])


MILL = Document("mill.txt", f"{prose(0, 6)}\n\n{FACT}\n\n{prose(6, 9)}")
OTHER = Document("other.txt", prose(28, 32))
SHORT = Document("short.md", f"{FACT}\n\n{prose(31, 32)}")


def serve(model, folder):
    settings = {"keep_ratio": 0.3, "contexts_dir": str(folder)}
    return LocalServer(
        model, "--kv-compression", "kvzip", "--kv-compression-config", json.dumps(settings),
        "--enable-prompt-tokens-details", "--enable-per-request-metrics",
        "--max-model-len", "1024", "--num-gpu-blocks-override", str(NUM_BLOCKS),
        environment={"VLLM_PLUGINS": "kvzip", "VLLM_SERVER_DEV_MODE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def server(real_model, folder):
    with serve(real_model, folder) as running:
        yield running


@pytest.fixture(scope="module")
def library(server):
    with ContextLibrary(server.url, part_tokens=PART_TOKENS) as library:
        yield library


def sample(server, name):
    return sum(value for key, value in server.metrics().items() if key.startswith(name))


def computed(server):
    name = "vllm:prompt_tokens_by_source_total"
    return sum(v for k, v in server.metrics().items() if name in k and "local_compute" in k)


def test_two_documents_are_read_once_and_the_second_question_reuses_them(server, library):
    before = computed(server)
    readings = [library.read(MILL), library.read(OTHER)]
    assert [len(reading.parts) > 1 for reading in readings] == [True, False]
    assert all(part.compressed_tokens > 250 for r in readings for part in r.parts)
    reader = Reader(library, readings, quoting="strict", answer_tokens=24)
    answer = reader.ask(QUESTION)
    first = computed(server) - before
    assert "4821" in answer.text
    (quote,) = answer.quotes
    assert (quote.document, quote.text) == (MILL.name, FACT)
    assert MILL.text[quote.start : quote.end] == FACT
    assert not reader.ask(ABSENT).found
    before = computed(server)
    again = reader.ask("What is the gate code of the old mill, please?")
    assert computed(server) - before <= 0.1 * first
    told = again.statistics
    assert told.calls == sum(len(reading.parts) for reading in readings)
    assert told.reused_tokens >= 0.9 * told.prompt_tokens
    assert told.reused_tokens + told.read_tokens == told.prompt_tokens
    assert told.parts_read_again == told.retries == 0
    assert told.keep_ratio < 0.4
    assert told.estimated_bytes_saved > 10**6
    assert 0 < told.first_token_seconds < told.seconds
    assert told.sources["first_token_seconds"] == "answers"
    counts = library.counts
    read = counts.parts_read
    copy = library.read(Document("a copy", MILL.text))
    assert [part.part for part in copy.parts] == [part.part for part in readings[0].parts]
    assert counts.parts_read == read


def test_another_process_finds_what_the_server_has_read(server, library):
    library.read(OTHER)
    before = computed(server)
    with ContextLibrary(server.url, part_tokens=PART_TOKENS) as other:
        other.read(OTHER)
        assert (other.counts.parts_found, other.counts.parts_read) == (1, 0)
    assert computed(server) - before < 64


def test_verification_confirms_over_the_same_prefixes(server, library):
    before = computed(server)
    answer = Reader(library, [library.read(MILL)], quoting="strict", answer_tokens=24).ask(
        QUESTION, verify=True
    )
    assert [claim.verdict for claim in answer.claims] == ["confirmed"]
    assert answer.statistics.calls > len(library.read(MILL).parts)
    assert answer.statistics.reused_tokens >= 0.85 * answer.statistics.prompt_tokens
    assert computed(server) - before < 600


def test_a_single_part_takes_a_single_call(library):
    reading = library.read(SHORT)
    assert len(reading.parts) == 1
    answer = Reader(library, [reading]).ask(QUESTION)
    assert (answer.statistics.calls, answer.merges) == (1, 0)
    assert "4821" in answer.text


def test_contexts_that_are_gone_are_read_again_or_come_from_files_and_are_counted(server, library):
    reading = library.read(MILL)
    reader = Reader(library, [reading], quoting="strict", answer_tokens=24)
    with ContextLibrary(server.url, part_tokens=PART_TOKENS, keep_files=True) as keeper:
        kept = keeper.read(OTHER)
        server.post("/reset_prefix_cache")  # as requests of others would make them go
        server.complete("a", 1)  # the list of contexts is that of the last step
        answers = reader.ask_all([QUESTION, ABSENT])
        assert "4821" in answers[0].text
        again = [answer.statistics.parts_read_again for answer in answers]
        assert sum(again) == len(reading.parts)
        before = computed(server)
        assert keeper.run(keeper.library.refresh([kept])) == len(kept.parts) == 1
        assert keeper.counts.parts_imported == keeper.counts.parts_read_again == 1
        assert computed(server) == before
    assert reader.ask(QUESTION).statistics.parts_read_again == 0


def test_a_cancelled_question_leaves_nothing_running(server):
    name = "vllm:num_requests_running{"

    async def ask_and_cancel():
        client = Server(server.url)
        library = AsyncContextLibrary(client, part_tokens=PART_TOKENS)
        reading = await library.read(MILL)
        endless = [replace(p, send={**p.send, "ignore_eos": True}) for p in reading.parts]
        reader = AsyncReader(library, [replace(reading, parts=endless)], answer_tokens=400)
        task = asyncio.create_task(reader.ask(QUESTION))
        while await asyncio.to_thread(sample, server, name) == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    before = sample(server, "vllm:generation_tokens_total")
    asyncio.run(ask_and_cancel())
    deadline = time.monotonic() + 20
    while sample(server, name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sample(server, name) == sample(server, "vllm:num_requests_waiting{") == 0
    assert sample(server, "vllm:generation_tokens_total") - before < 400


@pytest.mark.parametrize(
    ("faults", "retries"),
    [([429, 503], 2), ([DROP, 502], 2)],
    ids=["busy", "gone for a moment"],
)
def test_passing_faults_are_tried_again_and_counted(server, faults, retries):
    with (
        FaultyProxy(server.url) as proxy,
        ContextLibrary(proxy.url, part_tokens=PART_TOKENS, retries=QUICK) as library,
    ):
        reader = Reader(library, [library.read(OTHER)], quoting="none", answer_tokens=4)
        proxy.faults = list(faults)
        assert reader.ask(QUESTION).statistics.retries == retries
        assert proxy.faults == []


def test_lasting_faults_end_in_one_sentence(server):
    with FaultyProxy(server.url) as proxy:
        with ContextLibrary(
            proxy.url,
            part_tokens=PART_TOKENS,
            retries=Retries(most=2, first_pause_seconds=0.01, timeout_seconds=1),
        ) as library:
            reader = Reader(library, [library.read(OTHER)], quoting="none", answer_tokens=4)
            proxy.faults = [503] * 3
            with pytest.raises(ServerError, match=r"^\S+ answered HTTP 503 3 times: busy$"):
                reader.ask(QUESTION)
            assert proxy.faults == []
            proxy.faults = [500]
            with pytest.raises(ServerError, match="answered HTTP 500: busy"):
                reader.ask(QUESTION)
            proxy.faults = [2.0] * 3
            with pytest.raises(ServerError, match="did not answer within 1 s, tried 3 times"):
                reader.ask(QUESTION)
        url = proxy.url
    with (
        ContextLibrary(url, retries=Retries(most=1, first_pause_seconds=0.01)) as library,
        pytest.raises(ServerError, match="cannot be reached, tried 2 times"),
    ):
        library.read(OTHER)


def test_a_server_without_the_plugin_is_told_apart(server):
    with FaultyProxy(server.url) as proxy, ContextLibrary(proxy.url) as library:
        proxy.path, proxy.faults = "/kvzip/contexts", [404]
        with pytest.raises(ServerError, match="does not compress contexts; start it with"):
            library.read(OTHER)


def test_wishes_that_do_not_fit_are_refused_in_one_sentence(library):
    reading = library.read(MILL)
    with pytest.raises(QuestionError, match="The question takes"):
        Reader(library, [reading]).ask("word " * 900)
    with pytest.raises(QuestionError, match="is empty"):
        Reader(library, [reading]).ask("  ")
    with pytest.raises(QuestionError, match="no document"):
        Reader(library, []).ask(QUESTION)
    with pytest.raises(BudgetError, match="more than the budget of 1"):
        Reader(library, [reading], most_calls=1).ask(QUESTION)
    with (
        ContextLibrary(library.library.server.url, part_tokens=5000) as other,
        pytest.raises(DocumentError, match="this server takes 32 to"),
    ):
        other.read(OTHER)
    with pytest.raises(DocumentError, match=r"has [\d,]+ tokens \(estimated\), more than 256"):
        library.read(Document("large", "Ten megabytes of it. " * 500_000))

    async def inside():
        library.read(OTHER)

    with pytest.raises(ClientError, match="An event loop is running"):
        asyncio.run(inside())


def test_a_document_in_another_script_and_one_that_is_too_short_to_compress(library):
    sentence = "契約は一九九二年に東京で署名された。"
    document = Document("東京", "昨日は雨が降っていました。" * 9 + sentence)
    answer = Reader(library, [library.read(document)], answer_tokens=16).ask(
        "契約はどこで署名されましたか"
    )
    assert all(document.text[q.start : q.end] == q.text for q in answer.quotes)
    short = library.read(Document("short", FACT))
    assert short.parts[0].left_alone
    answer = Reader(library, [short]).ask(QUESTION)
    assert "4821" in answer.text
    assert "parts are not compressed" in answer.notes[0]


def test_the_command_reads_files_and_compares(server, tmp_path, capsys):
    path = tmp_path / SHORT.name
    path.write_text(SHORT.text, encoding="utf-8")
    asked = ["read", str(path), "--server", server.url, "--part-tokens", str(PART_TOKENS)]
    asked += ["--quoting", "strict", "--question", QUESTION]
    assert main([*asked, "--compare", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    quote = told["answers"][0]["quotes"][0]
    assert SHORT.text[quote["start"] : quote["end"]] == FACT
    without = told["without_compression"]
    assert told["reading"]["blocks_held"] < 0.5 * without["reading"]["blocks_held"]
    assert without["answers"][0]["statistics"]["calls"] == told["documents"][0]["parts"]
    pages = tmp_path / "pages"
    assert main([*asked, "--verify", "--report", str(pages)]) == 0
    shown = capsys.readouterr().out
    assert FACT in shown
    assert "MiB saved (estimated)" in shown
    assert f"Pages that show what is kept, with the whole text: 1, in {pages}" in shown
    (page,) = pages.iterdir()
    assert page.name == "1-short.md-1.html"
    assert "short.md, part 1 of 1" in page.read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    assert main([*asked, "--report", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err
    page.unlink()
    page.mkdir()  # so it cannot be written, but the answers are there
    assert main([*asked, "--report", str(pages)]) == 1
    shown = capsys.readouterr()
    assert FACT in shown.out
    assert "Is a directory" in shown.err


def test_a_restart_of_the_server_is_survived(server, real_model, folder):
    """The last test of this file: it stops the server of the others."""
    with (
        FaultyProxy(server.url) as proxy,
        ContextLibrary(proxy.url, part_tokens=PART_TOKENS) as library,
        ContextLibrary(proxy.url, part_tokens=PART_TOKENS, keep_files=True) as keeper,
    ):
        mill, other = library.read(MILL), keeper.read(OTHER)
        asking = Reader(library, [mill], quoting="strict", answer_tokens=24)
        before = asking.ask(QUESTION)
        server.stop()
        with serve(real_model, folder) as restarted:
            proxy.target = restarted.url
            assert computed(restarted) == 0
            answer = asking.ask(QUESTION)
            assert "4821" in answer.text
            assert answer.quotes == before.quotes
            assert answer.statistics.parts_read_again == len(mill.parts)
            assert asking.ask(QUESTION).statistics.parts_read_again == 0
            read = computed(restarted)
            assert keeper.run(keeper.library.refresh([other])) == len(other.parts) == 1
            assert keeper.counts.parts_imported == 1
            assert computed(restarted) == read
