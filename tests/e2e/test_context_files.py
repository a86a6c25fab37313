"""A compressed context leaves one engine as a file, and a server answers from it."""

import json
import time
import urllib.error
import urllib.request
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from context_job import export_contexts
from engine_job import MODEL

from vllm_kvzip.command.main import main
from vllm_kvzip.contexts.context_file import read_context, write_context
from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt
from vllm_kvzip.report.bitmaps import unpack

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATH, NAME = "/v1/kvzip/contexts", "a.document"
TOKENS, QUESTIONS, POOL = 1030, 6, 100
SETTINGS = {"mode": "mixed", "keep_bytes_ratio": 0.25, "full_share": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job") / "contexts"


@pytest.fixture(scope="module")
def prompts():
    context = make_context(np.random.default_rng(2), TOKENS, fact_density=0.3)
    asked = [question_prompt(context, key)[0] for key in list(context.facts)[:QUESTIONS]]
    return {"tokens": context.tokens.tolist(), "prompts": asked, "keep_ratio": None}


@pytest.fixture(scope="module")
def exported(folder, prompts):
    """What the engine that read the contexts says of them; its process is over."""
    large = make_context(np.random.default_rng(5), 1984).tokens.tolist()
    contexts = {NAME: prompts, "large": {"tokens": large, "prompts": [], "keep_ratio": 0.9}}
    return export_contexts(folder, SETTINGS, contexts)


@pytest.fixture(scope="module")
def server(folder, exported):
    """Another process with another hash of blocks, over another pool."""
    flags = ("--kv-compression", "kvzip", "--enable-prompt-tokens-details")
    for name, value in {**SETTINGS, "contexts_dir": folder}.items():
        flags += (f"--kv-compression-config.{name}", str(value))
    flags += ("--prefix-caching-hash-algo", "sha256_cbor", "--num-gpu-blocks-override", str(POOL))
    with LocalServer(str(MODEL), *flags, environment={"VLLM_PLUGINS": "kvzip"}) as running:
        yield running


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


def ask(server, prompts, send):
    """Texts and cached tokens of questions about a context."""
    replies = [server.complete(prompt, 16, **send) for prompt in prompts["prompts"]]
    texts = [reply["choices"][0]["text"] for reply in replies]
    return texts, {reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies}


def hits(server):
    return server.metrics()["vllm_kvzip_prefix_hits_total"]


def test_the_other_engine_answers_alike_and_reads_nothing(server, exported, prompts):
    told = exported[NAME]
    assert done(server, "")["contexts"] == []
    before = hits(server)
    imported = done(server, "/import", name=NAME)
    for name in ("id", "compressed_tokens", "blocks_held", "bytes", "send"):
        assert imported[name] == told[name]
    assert not imported["was_cached"]
    assert [entry["id"] for entry in done(server, "")["contexts"]] == [told["id"]]
    texts, cached = ask(server, prompts, imported["send"])
    assert texts == told["texts"]
    assert len(set(texts)) > 1  # the questions matter
    assert cached == {TOKENS // 32 * 32}
    assert hits(server) - before == QUESTIONS
    assert done(server, "/import", name=f"{NAME}.safetensors")["was_cached"]
    assert server.blocks_held() == 0


def test_what_is_explained_is_what_the_pages_hold(server, exported, prompts, folder):
    """A token is told by its key: in files of two ratios, equal positions have equal keys."""
    held = {}
    for ratio in (SETTINGS["keep_bytes_ratio"], 0.4):
        told = done(server, "/explain", prompt=prompts["tokens"], keep_ratio=ratio)
        done(server, "/export", id=told["id"], name="explained", keep_ratio=ratio)
        tensors = read_context(folder / "explained.safetensors").tensors
        heads, tokens = len(told["layers"]) * told["kv_heads"], told["compressed_tokens"]
        full, quantized = (
            [[t for t in range(tokens) if mask >> t & 1] for mask in unpack(bits, heads, tokens)]
            for bits in (b64decode(tier["kept"]) for tier in told["tiers"])
        )
        pages = {
            tier: tensors[f"{tier}.pages"].flatten().tolist() for tier in ("full", "quantized")
        }
        assert [len(head) for head in full] == [32 * number for number in pages["full"]]
        assert [bool(head) for head in quantized] == [bool(n) for n in pages["quantized"]]
        keys = tensors["full.keys"].flatten(0, 1)
        places = [(head, token) for head, own in enumerate(full) for token in own]
        held[ratio] = dict(zip(places, keys, strict=True))
        if ratio == SETTINGS["keep_bytes_ratio"]:
            assert told["tiers"] == exported[NAME]["explained"]["tiers"]  # of an LLM
        assert told["bytes_held"] == told["blocks_held"] * told["bytes_before"] // 32
    few, many = held.values()
    shared = few.keys() & many.keys()
    assert 500 < len(shared) <= len(few) < len(many)
    assert all(torch.equal(few[place], many[place]) for place in shared)
    other = [many[head, token] for head, token in shared if (head, token + 1) in many]
    after = [many[head, token + 1] for head, token in shared if (head, token + 1) in many]
    assert not any(map(torch.equal, other, after))  # keys tell tokens apart


def test_the_command_does_the_same(server, exported, capsys):
    """What has been imported leaves again as it came."""
    told = exported[NAME]
    where = ["--server", server.url]
    assert main(["contexts", "export", told["id"], "by-command", *where]) == 0
    assert main(["contexts", "import", "by-command", *where]) == 0
    assert main(["contexts", "list", *where]) == 0
    shown = capsys.readouterr().out
    assert f"by-command was cached already: context {told['id']}, 1024 tokens" in shown
    assert shown.count(told["id"]) >= 4
    assert main(["contexts", "import", "nothing", *where]) == 1
    assert "There is no context file nothing.safetensors" in capsys.readouterr().err


def test_it_is_a_fraction_of_the_bytes_and_in_the_list(server, exported, folder):
    first, second = (read_context(folder / f"{one}.safetensors") for one in (NAME, "by-command"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(second.tensors[name], first.tensors[name]) for name in first.tensors)
    assert replace(first, tensors={}) == replace(second, tensors={})
    size = (folder / f"{NAME}.safetensors").stat().st_size
    assert exported[NAME]["bytes"] == size
    (entry,) = [one for one in done(server, "/files")["files"] if one["name"] == NAME]
    assert (entry["id"], entry["bytes"]) == (exported[NAME]["id"], size)
    assert entry["compressed_tokens"] == 1024


def test_what_does_not_fit_is_refused_in_one_sentence(server, folder):
    whole = (folder / f"{NAME}.safetensors").read_bytes()
    middle = len(whole) // 2
    (folder / "torn.safetensors").write_bytes(whole[:middle])
    assert "torn.safetensors is torn" in refused(server, "/import", name="torn")
    byte = bytes([whole[middle] ^ 1])
    (folder / "byte.safetensors").write_bytes(whole[:middle] + byte + whole[middle + 1 :])
    assert "has changed since it was written" in refused(server, "/import", name="byte")
    context = read_context(folder / f"{NAME}.safetensors")

    def changed(**changes):
        """A whole file that says something else of itself."""
        write_context(folder / "changed.safetensors", replace(context, **changes))
        return refused(server, "/import", name="changed")

    for what in ("the model's weights", "the setting sink_tokens"):
        assert what in context.identity
        message = changed(identity={**context.identity, what: "other"})
        assert f"changed.safetensors does not fit this server: {what} is " in message
        assert "was other where" in message
    other = {"token_ids": context.token_ids[::-1]}  # which is not cached
    for name, tensor, sentence in (
        ("full.keys", context.tensors["full.keys"].double(), "its full.keys is not torch.float32"),
        ("full.pages", context.tensors["full.pages"] + 1, "the pages of its heads are not"),
    ):
        assert sentence in changed(tensors={**context.tensors, name: tensor}, **other)
    plan = replace(context.plan, num_prefix_blocks=31)
    assert "does not name whole blocks" in changed(plan=plan, **other)


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/import", {"name": f"../{NAME}"}, "is no name of a context file"),
        ("/export", {"id": "00000000", "name": "/etc/passwd"}, "is no name of a context file"),
        ("/import", {"name": "nothing"}, "There is no context file nothing.safetensors"),
        ("/export", {"id": "00000000"}, "No compressed context 00000000 is cached"),
        ("/import", {"name": NAME, "folder": "/tmp"}, "folder"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(server, path, body, sentence):
    assert sentence in refused(server, path, **body)


def test_a_context_of_one_client_stays(server):
    tokens = make_context(np.random.default_rng(4), 512).tokens.tolist()
    mine = done(server, "", prompt=tokens, cache_salt="mine")
    assert "requests with a cache_salt" in refused(server, "/export", id=mine["id"])
    everybodys = done(server, "", prompt=tokens)
    assert everybodys["id"] == mine["id"]
    assert done(server, "/export", id=mine["id"])["name"] == mine["id"]


def test_no_room_is_refused_and_the_pool_goes_on(server, exported, prompts):
    """Running requests leave fewer blocks than the context needs."""
    large, told = exported["large"], exported[NAME]
    assert large["blocks_held"] > POOL - 2 * 1280 // 32
    running = [server.stream([7 + n] * 1280, 700, vllm_xargs={"kvzip": "off"}) for n in range(6)]
    for answer in running[:2]:
        next(answer)
    with ThreadPoolExecutor() as waiting:  # the pool stays full, however slow this test is
        first_words = [waiting.submit(next, answer) for answer in running[2:]]
        status, answer = call(server, "/import", {"name": "large"})
        for stream in running[:2]:
            stream.close()
        for stream, first_word in zip(running[2:], first_words, strict=True):
            first_word.result()
            stream.close()
    assert status == 400
    message = answer["error"]["message"]
    assert f"it needs {large['blocks_held']} blocks, and requests leave" in message
    deadline = time.monotonic() + 20
    while server.blocks_held() and time.monotonic() < deadline:
        time.sleep(0.1)
    imported = done(server, "/import", name="large")
    assert imported["send"]["vllm_xargs"]["kvzip_keep_ratio"] == 0.9
    assert server.blocks_held() == 0
    done(server, "/import", name=NAME)  # its blocks may have had to make room
    assert ask(server, prompts, told["send"])[0] == told["texts"]
