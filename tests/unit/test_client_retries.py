"""Calls that fail are tried again, a bounded number of times, and each pause is longer."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import openai
import pytest

from vllm_kvzip.client import Server
from vllm_kvzip.client.errors import ServerError
from vllm_kvzip.client.retries import Retries, retried
from vllm_kvzip.command.main import main

QUICK = Retries(most=3, first_pause_seconds=0.001)


@pytest.fixture
def scripted():
    """A server that answers a list of (status, body), one by one, and the last one for ever."""
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def ask(url, retries=QUICK):
    """What /models says, and how often it was asked again."""

    async def once():
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        again = []
        try:
            call = lambda: client.get("/models", cast_to=object)  # noqa: E731
            return await retried(call, retries, lambda: again.append(1)), len(again)
        finally:
            await client.close()

    return asyncio.run(once())


@pytest.mark.parametrize("statuses", [[429], [503, 503], [408, 502, 504]])
def test_what_passes_is_tried_again(scripted, statuses):
    url, answers = scripted
    answers += [*((status, {}) for status in statuses), (200, {"data": []})]
    assert ask(url) == ({"data": []}, len(statuses))


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_what_does_not_pass_is_not_tried_again(scripted, status):
    url, answers = scripted
    answers += [(status, {"error": {"message": "Because."}}), (200, {})]
    with pytest.raises(ServerError, match=rf"answered HTTP {status}: Because\.$") as refused:
        ask(url)
    assert (refused.value.status, refused.value.kind) == (status, "")
    assert len(answers) == 1


def test_tries_are_bounded(scripted):
    url, answers = scripted
    answers += [(503, {"error": "busy"})] * 10
    with pytest.raises(ServerError, match="answered HTTP 503 4 times: "):
        ask(url)
    assert len(answers) == 6


def test_pauses_grow_up_to_a_limit_and_follow_the_server():
    retries = Retries(first_pause_seconds=1.0, longest_pause_seconds=5.0)
    nothing = Exception()
    pauses = [retries.pause_seconds(tries, nothing) for tries in (1, 2, 3, 4, 9)]
    for pause, due in zip(pauses, (1, 2, 4, 5, 5), strict=True):
        assert 0.75 * due <= pause <= due
    for said, due in (("3", 3), ("100", 5), ("tomorrow", 1)):
        told = Exception()
        told.response = SimpleNamespace(headers={"retry-after": said})
        assert 0.75 * due <= retries.pause_seconds(1, told) <= due


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "nothing", "http://", "http://host:port", "http://[::1"],
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ServerError, match="is not the URL of a server"):
        Server(url)
    assert Server("http://host:8000/v1/").url == "http://host:8000"


def test_a_server_that_is_not_vllm_gets_a_sentence(scripted, tmp_path, capsys):
    url, answers = scripted
    answers.append((200, {"data": [{"id": "model"}]}))
    file = tmp_path / "a.txt"
    file.write_text("Some text.", encoding="utf-8")
    assert main(["read", str(file), "--question", "What?", "--server", url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "does not tell max_model_len; is it a vLLM server?" in said
    assert main(["read", str(file), "--question", "?", "--server", url, "--model", "b"]) == 1
    assert "has no model b; it has model." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listed", "sentence"),
    [
        ([], "does not answer /models as a vLLM server does"),
        ({"data": []}, "lists no model"),
        ({"models": 1}, "lists no model"),
        (b"{", "is no JSON"),
        (b"<html></html>", "is no JSON"),
    ],
)
def test_what_no_vllm_server_answers_gets_a_sentence(scripted, listed, sentence):
    url, answers = scripted
    answers.append((200, listed))
    with pytest.raises(ServerError, match=sentence):
        asyncio.run(Server(url).facts())


def test_the_type_of_an_error_is_told_and_an_adapter_is_as_long_as_its_model(scripted):
    url, answers = scripted
    answers.append((400, {"error": {"message": "Because.", "type": "kind"}}))
    with pytest.raises(ServerError) as refused:
        ask(url)
    assert refused.value.kind == "kind"
    model = {"id": "model", "max_model_len": 99}
    answers[:] = [(200, {"data": [model, {"id": "adapter", "parent": "model"}]})]
    assert asyncio.run(Server(url, model="adapter")._model()) == ("adapter", 99)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.bin", b"a\x00b", "is a binary file"),
        ("none", None, "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_file(tmp_path, capsys, name, data, sentence):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    assert main(["read", str(path), "--question", "What?"]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("vllm-kvzip read: error: ")
    assert said.count("\n") == 1


def test_the_command_names_a_missing_package(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vllm_kvzip.client", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "vllm_kvzip.command.reading_progress", raising=False)
    assert main(["read", "file", "--question", "What?"]) == 1
    assert "pip install 'vllm-kvzip[client]'" in capsys.readouterr().err
