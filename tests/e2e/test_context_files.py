"""A compressed context leaves one server as a file, and another server answers from it."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from engine_job import MODEL

from vllm_kvzip.command.main import main
from vllm_kvzip.contexts.context_file import read_context, write_context
from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATH = "/v1/kvzip/contexts"
TOKENS, QUESTIONS, POOL = 1030, 6, 100
SETTINGS = {"mode": "mixed", "keep_bytes_ratio": 0.25, "full_share": 0.6}


def started(folder, seed, *more):
    """A server that is still starting; block hashes differ between those of two seeds."""
    flags = ("--kv-compression", "kvzip", "--enable-prompt-tokens-details", *more)
    for name, value in {**SETTINGS, "contexts_dir": folder}.items():
        flags += (f"--kv-compression-config.{name}", str(value))
    environment = {"VLLM_PLUGINS": "kvzip", "PYTHONHASHSEED": seed}
    return LocalServer(str(MODEL), *flags, environment=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def servers(folder):
    other = ("--prefix-caching-hash-algo", "sha256_cbor", "--num-gpu-blocks-override", str(POOL))
    here, there = started(folder, "1"), started(folder, "2", *other)
    with here, there:
        yield here, there


@pytest.fixture(scope="module")
def exported(servers):
    """The context, what the export told, and what the server that read it answers."""
    here, _ = servers
    context = make_context(np.random.default_rng(2), TOKENS, fact_density=0.3)
    compressed = done(here, "", prompt=context.tokens.tolist())
    answers = ask(here, context, compressed["send"])
    return context, done(here, "/export", id=compressed["id"], name="a.document"), answers


def call(server, path, body=None):
    """Status and JSON of a request; a POST when there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + PATH + path, data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def done(server, path, **body):
    status, answer = call(server, path, body or None)
    assert status == 200, answer
    return answer


def refused(server, path, **body):
    """The sentence that says why; nothing that is cached changes."""
    before = done(server, "")
    status, answer = call(server, path, body)
    assert status in (400, 404)
    assert done(server, "") == before
    return answer["error"]["message"]


def ask(server, context, send):
    """Texts and cached tokens of questions about a context."""
    found = []
    for key in list(context.facts)[:QUESTIONS]:
        prompt, _ = question_prompt(context, key)
        reply = server.complete(prompt, 16, **send)
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        found.append((reply["choices"][0]["text"], cached))
    return found


def hits(server):
    return server.metrics()["vllm_kvzip_prefix_hits_total"]


def test_the_other_server_answers_alike_and_reads_nothing(servers, exported):
    _, there = servers
    context, told, answers = exported
    assert done(there, "")["contexts"] == []
    before = hits(there)
    imported = done(there, "/import", name="a.document")
    for name in ("id", "compressed_tokens", "blocks_held", "bytes", "send"):
        assert imported[name] == told[name]
    assert not imported["was_cached"]
    assert [entry["id"] for entry in done(there, "")["contexts"]] == [told["id"]]
    assert ask(there, context, imported["send"]) == answers
    assert len({text for text, _ in answers}) > 1  # the questions matter
    assert {cached for _, cached in answers} == {TOKENS // 32 * 32}
    assert hits(there) - before == QUESTIONS
    assert done(there, "/import", name="a.document.safetensors")["was_cached"]
    assert there.blocks_held() == 0


def test_the_command_does_the_same(servers, exported, capsys):
    here, _ = servers
    _, told, _ = exported
    assert main(["contexts", "export", told["id"], "by-command", "--server", here.url]) == 0
    assert main(["contexts", "import", "by-command", "--server", here.url]) == 0
    assert main(["contexts", "list", "--server", here.url]) == 0
    shown = capsys.readouterr().out
    assert f"by-command was cached already: context {told['id']}, 1024 tokens" in shown
    assert shown.count(told["id"]) >= 4
    assert main(["contexts", "import", "nothing", "--server", here.url]) == 1
    assert "There is no context file nothing.safetensors" in capsys.readouterr().err


def test_it_is_a_fraction_of_the_bytes_and_in_the_list(servers, exported, folder):
    _, told, _ = exported
    assert told["bytes"] == (folder / "a.document.safetensors").stat().st_size
    (entry,) = [
        entry for entry in done(servers[1], "/files")["files"] if entry["name"] == "a.document"
    ]
    assert (entry["id"], entry["bytes"]) == (told["id"], told["bytes"])
    assert entry["compressed_tokens"] == 1024


def changed(folder, name, **changes):
    """A whole file that says something else of itself."""
    context = replace(read_context(folder / "a.document.safetensors"), **changes)
    write_context(folder / f"{name}.safetensors", context)


def test_what_does_not_fit_is_refused_in_one_sentence(servers, exported, folder):
    _, there = servers
    whole = (folder / "a.document.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "torn.safetensors is torn" in refused(there, "/import", name="torn")
    middle = len(whole) // 2
    byte = bytes([whole[middle] ^ 1])
    (folder / "byte.safetensors").write_bytes(whole[:middle] + byte + whole[middle + 1 :])
    assert "has changed since it was written" in refused(there, "/import", name="byte")
    context = read_context(folder / "a.document.safetensors")
    for name, what in (("model", "the model's weights"), ("setting", "the setting sink_tokens")):
        assert what in context.identity
        changed(folder, name, identity={**context.identity, what: "other"})
        message = refused(there, "/import", name=name)
        assert f"{name}.safetensors does not fit this server: {what} is " in message
        assert "was other where" in message
    other = {"token_ids": context.token_ids[::-1]}  # which is not cached
    tensors = {**context.tensors, "full.keys": context.tensors["full.keys"].double()}
    changed(folder, "wide", tensors=tensors, **other)
    assert "its full.keys is not torch.float32" in refused(there, "/import", name="wide")
    tensors = {**context.tensors, "full.pages": context.tensors["full.pages"] + 1}
    changed(folder, "pages", tensors=tensors, **other)
    assert "the pages of its heads are not" in refused(there, "/import", name="pages")
    changed(folder, "plan", plan=replace(context.plan, num_prefix_blocks=31), **other)
    assert "does not name whole blocks" in refused(there, "/import", name="plan")


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/import", {"name": "../a.document"}, "is no name of a context file"),
        ("/export", {"id": "00000000", "name": "/etc/passwd"}, "is no name of a context file"),
        ("/import", {"name": "nothing"}, "There is no context file nothing.safetensors"),
        ("/export", {"id": "00000000"}, "No compressed context 00000000 is cached"),
        ("/import", {"name": "a.document", "folder": "/tmp"}, "folder"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(servers, path, body, sentence):
    assert sentence in refused(servers[1], path, **body)


def test_a_context_of_one_client_stays(servers):
    here, _ = servers
    tokens = make_context(np.random.default_rng(4), 512).tokens.tolist()
    mine = done(here, "", prompt=tokens, cache_salt="mine")
    assert "requests with a cache_salt" in refused(here, "/export", id=mine["id"])


def test_no_room_is_refused_and_the_pool_goes_on(servers, exported):
    """Running requests leave fewer blocks than the context needs."""
    here, there = servers
    tokens = make_context(np.random.default_rng(5), 1984).tokens.tolist()
    large = done(here, "", prompt=tokens, keep_ratio=0.9)
    done(here, "/export", id=large["id"], name="large", keep_ratio=0.9)
    assert large["blocks_held"] > POOL - 2 * 1280 // 32
    running = [there.stream([7 + n] * 1280, 700, vllm_xargs={"kvzip": "off"}) for n in range(2)]
    for answer in running:
        next(answer)
    message = refused(there, "/import", name="large")
    assert f"it needs {large['blocks_held']} blocks, and requests leave" in message
    for answer in running:
        answer.close()
    deadline = time.monotonic() + 20
    while there.blocks_held() and time.monotonic() < deadline:
        time.sleep(0.1)
    imported = done(there, "/import", name="large")
    assert imported["send"]["vllm_xargs"]["kvzip_keep_ratio"] == 0.9
    assert there.blocks_held() == 0
    context, told, answers = exported  # its blocks had to make room
    assert {entry["id"] for entry in done(there, "")["contexts"]} >= {large["id"]}
    done(there, "/import", name="a.document")
    assert ask(there, context, told["send"]) == answers
