"""The contexts endpoint of a real server: compress ahead of time, list, and refuse."""

import json
import os
import urllib.error
import urllib.request
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from browser import Browser, find_browser
from engine_job import MODEL
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from vllm_kvzip.command.main import main
from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context, question_prompt
from vllm_kvzip.report.bitmaps import unpack
from vllm_kvzip.report.explanation import Explanation
from vllm_kvzip.vllm_bridge.server.contexts_endpoint import ContextsEndpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAULTY_SCORER = Path(__file__).parent.parent / "support" / "faulty_scorer"
"""Another package with a scorer: the default one, which fails on contexts of 777 tokens."""
PATH, KEY = "/v1/kvzip/contexts", "secret"
TEMPLATE = """{% for message in messages %}{{ message['content'] }} repeat . {% endfor %}\
{% if add_generation_prompt %}copy {% endif %}"""  # closes each message, as chat templates do


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--kv-compression", "kvzip", "--kv-compression-config.keep_ratio", "0.3")
    more = ("--api-key", KEY, "--chat-template", str(template))
    more += ("--kv-compression-config.scorer", "faulty")
    path = os.pathsep.join([str(FAULTY_SCORER), os.environ.get("PYTHONPATH", "")])
    environment = {"VLLM_PLUGINS": "kvzip", "PYTHONPATH": path}
    with LocalServer(str(MODEL), *flags, *more, environment=environment) as running:
        yield running


def call(server, path=PATH, body=None, key=KEY):
    """Status and JSON of a request; a POST when there is a body."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_context_is_compressed_before_anybody_asks(server):
    context = make_context(np.random.default_rng(2), 1030, fact_density=0.3)
    tokens = context.tokens.tolist()
    status, answer = call(server, body={"prompt": tokens})
    assert status == 200
    assert answer["tokens"] == 1030
    assert answer["compressed_tokens"] == 1024
    assert answer["cached_tokens"] == 0
    assert (answer["blocks_held"], answer["blocks_before"]) == (10, 32)
    assert answer["keep_ratio"] == 10 / 32
    assert answer["seconds"] > 0
    status, listed = call(server)
    assert status == 200
    assert [entry["id"] for entry in listed["contexts"]] == [answer["id"]]
    assert listed["blocks_held"] == 10
    before = server.metrics()
    key = next(iter(context.facts))
    prompt, value = question_prompt(context, key)
    status, reply = call(
        server,
        "/v1/completions",
        {
            "model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0,
            "vllm_xargs": {"kvzip_context_tokens": 1030},
        },
    )  # fmt: skip
    assert status == 200
    assert reply["choices"][0]["text"].split() == [VOCABULARY.words[value]]
    name = "vllm_kvzip_prefix_hits_total"
    assert server.metrics()[name] - before[name] == 1
    again = call(server, body={"prompt": tokens})[1]
    assert (again["id"], again["cached_tokens"]) == (answer["id"], 1024)
    assert len(call(server)[1]["contexts"]) == 1


def test_a_context_has_the_ratio_it_is_given_and_serves_requests_of_that_ratio(server):
    context = make_context(np.random.default_rng(7), 1024, fact_density=0.3)
    status, answer = call(server, body={"prompt": context.tokens.tolist(), "keep_ratio": 0.75})
    assert status == 200
    assert (answer["blocks_held"], answer["keep_ratio"]) == (24, 0.75)
    prompt, _ = question_prompt(context, next(iter(context.facts)))
    for options, cached in (({"kvzip_keep_ratio": 0.75}, 1), ({}, 0)):
        before = server.metrics()
        body = {
            "model": server.model, "prompt": prompt, "max_tokens": 2,
            "vllm_xargs": {"kvzip_context_tokens": 1024, **options},
        }  # fmt: skip
        assert call(server, "/v1/completions", body)[0] == 200
        name = "vllm_kvzip_prefix_hits_total"
        assert server.metrics()[name] - before[name] == cached
    status, answer = call(server, body={"prompt": prompt, "keep_ratio": 1.5})
    assert status == 400
    status, answer = call(server, body={"prompt": prompt, "keep_ratio": 1.0})
    assert status == 400
    assert "Nothing would be freed: keep_ratio 1.0" in answer["error"]["message"]
    assert answer["error"]["type"] == "kvzip_left_alone"
    assert answer["error"]["param"] == "nothing_to_free"


def test_text_and_chat_contexts_are_tokenized_by_the_server(server):
    context = make_context(np.random.default_rng(3), 600)
    by_text = call(server, body={"prompt": context.text, "model": server.model})[1]
    messages = [{"role": "user", "content": context.text}]
    by_chat = call(server, body={"messages": messages})[1]
    assert by_text["tokens"] == by_chat["tokens"] == 600
    assert by_text["id"] == by_chat["id"]
    assert by_chat["cached_tokens"] == 576
    salted = call(server, body={"prompt": context.text, "cache_salt": "mine"})[1]
    assert salted["cached_tokens"] == 0
    status, reply = call(
        server,
        "/v1/chat/completions",
        {
            "model": server.model, "max_tokens": 2,
            "messages": [*messages, {"role": "user", "content": context.text[:200]}],
            "vllm_xargs": {"kvzip_context_tokens": 600},
        },
    )  # fmt: skip
    assert status == 200
    assert reply["usage"]["prompt_tokens"] > 600


@pytest.mark.parametrize(
    ("place", "tokens"), [("same message", 607), ("next message", 607), ("system prompt", 609)]
)
def test_a_chat_client_asks_about_a_document_without_counting_tokens(server, place, tokens):
    """607 tokens: with what closes the message, a block would be full and would match no question
    in the same message. A system prompt is whole before anybody asks.

    Through the client that people use, with nothing but what the endpoint said to send.
    """
    seed = 20 + len(place)
    context = make_context(np.random.default_rng(seed), 607)
    role = "system" if place == "system prompt" else "user"
    document = [{"role": role, "content": context.text}]
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY)
    body = {"messages": document, "cache_salt": place}
    answer = client.post("/kvzip/contexts", body=body, cast_to=object)
    assert (answer["tokens"], answer["compressed_tokens"]) == (tokens, tokens // 32 * 32)
    assert answer["send"] == {"vllm_xargs": {"kvzip_context_tokens": tokens}, "cache_salt": place}
    question = "question " + VOCABULARY.words[next(iter(context.facts))]
    if place == "same message":
        messages = [{"role": role, "content": f"{context.text} {question}"}]
    else:
        messages = [*document, {"role": "user", "content": question}]
    before = server.metrics()
    reply = client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=2, extra_body=answer["send"]
    )
    after = server.metrics()
    assert reply.usage.prompt_tokens > 609
    hits = "vllm_kvzip_prefix_hits_total"
    assert after[hits] - before[hits] == 1
    told = reply.model_extra["kv_transfer_params"]["kvzip"]
    assert told["compressed_tokens"] == tokens // 32 * 32


def test_a_chat_context_may_end_behind_the_marker_of_an_answer(server):
    text = make_context(np.random.default_rng(30), 607).text
    body = {"messages": [{"role": "user", "content": text}], "add_generation_prompt": True}
    assert call(server, body=body)[1]["tokens"] == 607 + 3


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "either `prompt` or `messages`"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "give one of them"),
        ({"prompt": "w1 w2"}, 400, "has 2 tokens and is left alone: min_prompt_tokens is 256"),
        ({"prompt": [7] * 3000}, 400, "2048"),
        ({"prompt": "w1 " * 3000}, 400, "at least 2049 input tokens"),
        ({"prompt": [7] * 2047}, 400, "has 2047 tokens, more than the 2046"),
        ({"prompt": [7] * 300, "file": "/etc/passwd"}, 400, "file"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [7] * 300, "model": "other"}, 404, "`other` does not exist"),
        ({"prompt": [7] * 300, "cache_salt": ""}, 400, "cache_salt"),
        ({"messages": [{"role": "user", "content": [5]}]}, 400, "ContentPart"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "content"),
    ],
)
def test_wrong_bodies_are_told_what_is_wrong(server, body, status, sentence):
    got, answer = call(server, body=body)
    assert got == status
    assert sentence in json.dumps(answer)


def test_a_context_that_cannot_be_compressed_is_told_and_the_server_goes_on(server):
    tokens = make_context(np.random.default_rng(5), 777).tokens.tolist()
    status, answer = call(server, body={"prompt": tokens})
    assert status == 500
    assert "could not be compressed (failed)" in answer["error"]["message"]
    _, listed = call(server)
    question = {"model": str(MODEL), "prompt": tokens, "max_tokens": 8}
    asked = {**question, "vllm_xargs": {"kvzip_context_tokens": 777}}
    status, reply = call(server, "/v1/completions", asked)
    assert status == 200
    assert reply["kv_transfer_params"] == {"kvzip": {"left_alone": "failed"}}
    assert reply["usage"]["completion_tokens"] == 8
    assert call(server)[1] == listed  # nothing half done
    assert call(server, body={"prompt": tokens[:-40]})[0] == 200


def test_the_servers_keys_guard_it(server):
    assert call(server, key="wrong")[0] == 401
    assert call(server, body={"prompt": [7] * 300}, key="wrong")[0] == 401


@pytest.fixture(scope="module")
def report(server, tmp_path_factory):
    """A document, what the server explains of it, and the page that the command writes."""
    folder = tmp_path_factory.mktemp("report")
    document, page = folder / "facts & more.txt", folder / "report.html"
    document.write_text(make_context(np.random.default_rng(40), 1030, fact_density=0.3).text)
    told = call(server, PATH + "/explain", {"prompt": document.read_text()})[1]
    flags = ["--server", server.url, "--api-key", KEY, "--output", str(page)]
    assert main(["report", str(document), *flags]) == 0
    return document, told, page


def test_what_is_kept_is_explained(server, report):
    document, told, _ = report
    assert "".join(told["token_texts"]) == document.read_text()
    assert (told["tokens"], told["compressed_tokens"], told["blocks_held"]) == (1030, 1024, 10)
    found = Explanation.read(told)
    assert sum(found.tiers[0].counts) == 10 * 32 * found.num_heads
    assert all(count % 32 == 0 for count in found.tiers[0].counts)
    for mask in unpack(b64decode(found.tiers[0].bits), found.num_heads, 1024):
        assert mask & 0b1111 == 0b1111  # sink tokens
    assert found.settings["scorer"] == "faulty"
    listed = [one for one in call(server)[1]["contexts"] if one["id"] == told["id"]]
    assert [one["blocks_held"] for one in listed] == [10]
    body = {"prompt": document.read_text(), "keep_ratio": 0.75}
    assert call(server, PATH + "/explain", body)[1]["blocks_held"] == 24
    assert "left alone" in json.dumps(call(server, PATH + "/explain", {"prompt": "w1"}))
    assert call(server, PATH + "/explain", {"prompt": [7] * 777})[0] == 500  # the scorer fails


def test_a_reader_sees_what_was_kept(report, tmp_path):
    if (path := find_browser()) is None:
        pytest.skip("No browser to look at the page with; get one by: apt-get install chromium")
    document, told, page = report
    found = Explanation.read(told)
    num_tokens = found.compressed_tokens
    masks = unpack(b64decode(found.tiers[0].bits), found.num_heads, num_tokens)
    least, most = (chosen(range(len(masks)), key=found.shares.__getitem__) for chosen in (min, max))
    assert found.shares[least] < found.shares[most]
    shades = """[...document.querySelectorAll("#text .passage:not(.dense)")].map(
        (passage) => getComputedStyle(passage).backgroundColor)"""
    with Browser(path, tmp_path) as browser:
        browser.resize(1300, 900)
        browser.open(page.as_uri())
        assert browser.ask("document.querySelector('#text').textContent") == document.read_text()
        assert "facts & more.txt" in browser.ask("document.title")
        of_all = browser.ask(shades)
        assert len(set(of_all)) > 3
        cells = browser.ask("[...document.querySelectorAll('.cell')].map(c => c.ariaLabel)")
        assert len(cells) == found.num_heads
        kept = f"keeps {masks[least].bit_count()} of {num_tokens:,} tokens"
        assert kept in cells[least]
        colors = browser.ask("""[...document.querySelectorAll(".cell")].map(
            (cell) => getComputedStyle(cell).backgroundColor)""")
        assert colors[least] != colors[most]

        browser.click(".cell", least)  # the text by one head
        assert kept in browser.ask("document.querySelector('#tip').innerText")
        layer, head = divmod(least, found.kv_heads)
        assert f"layer {layer}, head {head}" in browser.ask("document.body.innerText")
        of_head = browser.ask(shades)
        assert of_head != of_all
        browser.click("input[value=tokens]")
        colors = browser.ask("""[...document.querySelectorAll("#text .passage > span")].map(
            (token) => getComputedStyle(token).backgroundColor)""")[:num_tokens]
        assert len(set(colors)) == 2
        assert [color == colors[0] for color in colors] == [
            bool(masks[least] >> token & 1) for token in range(num_tokens)
        ]
        browser.press("Escape")
        browser.click("input[value=passages]")
        assert browser.ask(shades) == of_all

        browser.click("#least button")  # what was dropped
        where = browser.ask("""(({ top, bottom }) => [top, bottom, innerHeight])(
            document.querySelector("#text .found").getBoundingClientRect())""")
        assert 0 < where[0] < where[1] < where[2]
        assert (
            browser.ask("document.querySelector('#text .found').textContent")
            .strip()
            .startswith(
                browser.ask("document.querySelector('#least q').textContent").rstrip("\u2026")
            )
        )
        browser.ask("document.querySelector('.cell').focus()")  # by keyboard
        browser.press("ArrowDown")
        browser.press("ArrowRight")
        place = browser.ask(
            "[document.activeElement.place.layer, document.activeElement.place.head]"
        )
        assert place == [1, 1]
        browser.prefer("dark")
        assert browser.ask(shades) != of_all
        browser.resize(360, 700)
        assert browser.ask("document.documentElement.scrollWidth") <= 360
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]


@pytest.mark.parametrize("body", [None, {"prompt": [7] * 300}])
def test_a_server_without_compression_says_so(body):
    app = FastAPI()
    init_exception_handler(app)
    ContextsEndpoint().attach_router(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.kvzip_engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    client = TestClient(app)
    answer = client.get(PATH) if body is None else client.post(PATH, json=body)
    assert answer.status_code == 404
    assert "KV compression is off" in answer.json()["error"]["message"]


def test_it_is_there_only_when_named(monkeypatch):
    from vllm import envs
    from vllm.plugins import load_endpoint_plugins

    monkeypatch.setattr(envs, "VLLM_PLUGINS", None, raising=False)
    assert load_endpoint_plugins(("generate",)) == []
    monkeypatch.setattr(envs, "VLLM_PLUGINS", ["kvzip"], raising=False)
    (plugin,) = load_endpoint_plugins(("generate",))
    assert plugin.name == "kvzip"
