"""`vllm serve` with the flag: real HTTP, real metrics of a real server, several processes."""

import concurrent.futures
import json
import re
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job

from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import (
    VOCABULARY,
    copy_prompt,
    make_context,
    question_prompt,
)
from vllm_kvzip.metrics import METRICS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Far more than the model was trained for: a request can outlive a reader who falls behind.
MAX_MODEL_LEN = 32768
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server():
    flags = ("--kv-compression", "kvzip", "--kv-compression-config.keep_ratio", "0.25")
    flags += ("--hf-overrides", json.dumps({"max_position_embeddings": MAX_MODEL_LEN}))
    stores = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}  # else no response is made in the background
    with LocalServer(str(MODEL), *flags, environment=stores) as running:
        yield running


def kvzip(samples, name):
    return samples["vllm_kvzip_" + name]


@pytest.mark.versions
def test_blocks_come_back_while_a_request_decodes_and_the_answer_is_right(server):
    context = make_context(np.random.default_rng(3), 1500, fact_density=0.6)
    prompt, expected = copy_prompt(context, 600, num_answer_tokens=200)

    def generated(samples):
        return next(v for k, v in samples.items() if k.startswith("vllm:generation_tokens_total"))

    before, tokens_before = server.blocks_held(), generated(server.metrics())
    answer, held, saved, kept, dense, ratios = [], [], [], [], [], []
    # It must not end before the last look at the metrics, however slow this reader is.
    stream = server.stream(prompt, MAX_MODEL_LEN - len(prompt))
    for piece in stream:
        answer.extend(piece.split())
        if len(answer) == 200:
            stream.close()
            break
        if len(answer) in (50, 100, 150):
            samples = server.metrics()
            # The server may be ahead of what has been read here.
            held.append((server.blocks_held(samples) - before, generated(samples) - tokens_before))
            saved.append(kvzip(samples, "kv_bytes_saved"))
            kept.append(kvzip(samples, 'kv_bytes_held{kind="compressed"}'))
            dense.append(kvzip(samples, 'kv_bytes_held{kind="full"}'))
            ratios.append(kvzip(samples, "eviction_ratio"))
    prompt_blocks = -(-len(prompt) // 32)
    assert len(held) == 3
    for blocks, num_generated in held:
        output_blocks = -(-(len(prompt) + num_generated) // 32) - prompt_blocks
        assert prompt_blocks - (blocks - output_blocks) >= 0.7 * prompt_blocks
    freed = len(prompt) // 32 - -(-len(prompt) // 32 // 4)
    block_bytes = 32 * 4 * 4 * 32 * 2 * 4  # tokens, layers, KV heads, head size, K and V, float32
    assert saved == [freed * block_bytes] * 3
    assert kept == [(len(prompt) // 32 - freed) * block_bytes] * 3
    assert 0 < dense[0] <= dense[1] <= dense[2]  # the prompt's tail, and what is generated
    assert all(size % block_bytes == 0 for size in dense)
    assert ratios == [pytest.approx(freed / (len(prompt) // 32))] * 3
    assert kvzip(samples, 'attention_seconds_count{phase="decode"}') >= 4  # of 150 steps and more
    words = [VOCABULARY.words[index] for index in expected]
    assert np.mean([a == b for a, b in zip(answer, words, strict=True)]) > 0.9


def test_counters_add_up_under_concurrent_requests(server):
    rng = np.random.default_rng(4)
    lengths = [300, 700, 1024, 90, 1500, 40]
    prompts = [make_context(rng, length).tokens.tolist() for length in lengths]
    before = server.metrics()
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: list(server.stream(prompt, 40)), prompts))
    after = server.metrics()
    assert all("".join(answer).split() for answer in answers)

    def grown(name):
        return kvzip(after, name) - kvzip(before, name)

    blocks = [length // 32 for length in lengths if length >= 256]
    freed = sum(block - -(-block // 4) for block in blocks)
    assert grown("requests_compressed_total") == 4
    assert grown('requests_skipped_total{reason="below_min_prompt_tokens"}') == 2
    assert grown("blocks_freed_total") == freed
    assert grown("tokens_evicted_total") == 32 * freed
    assert grown("keep_ratio_count") == 4
    assert grown('compress_seconds_count{stage="compact"}') == 4
    assert kvzip(after, "kv_bytes_saved") == 0
    assert kvzip(after, 'kv_bytes_held{kind="compressed"}') == 0
    assert kvzip(after, 'kv_bytes_held{kind="full"}') == 0
    assert kvzip(after, "eviction_ratio") == 0
    assert server.blocks_held() == 0


def test_the_dashboard_asks_for_what_the_server_exports(server):
    dashboard = json.loads((ROOT / "scripts" / "grafana_dashboard.json").read_text())
    queries = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    )
    asked = set(re.findall(r"vllm(?:_kvzip_|:)\w+", queries))
    exported = {sample.split("{")[0] for sample in server.metrics()}
    assert asked <= exported
    for metric in METRICS:
        assert any(name.startswith(metric.name) for name in asked), metric.name


def test_text_prompts_and_chat_go_through_the_same_door(server):
    context = make_context(np.random.default_rng(8), 600, fact_density=0.6)
    key, value = next(iter(context.facts.items()))
    text = f"{context.text} ? {VOCABULARY.words[key]}"
    assert "".join(server.stream(text, 2)).split() == [VOCABULARY.words[value], "."]


@pytest.mark.versions
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kvzip_context_tokens": 601}, "which is 600 tokens"),
        ({"kvzip_context_tokens": -1}, "must lie between 0 and"),
        ({"kvzip_context_tokens": "many"}, "must be a whole number of tokens"),
        ({"kvzip_contxt_tokens": 5}, "did you mean kvzip_context_tokens"),
        ({"kvzip_keep_ratio": 1.5}, "kvzip_keep_ratio=1.5 must be a number above 0 and up to 1"),
        ({"kvzip_keep_ratio": "half"}, "kvzip_keep_ratio='half' must be a number"),
        ({"kvzip": "no"}, 'must be "on" or "off"'),
        ({"kvzip_decode_budget": 640}, "This server was started without decode_budget"),
        ({"kvzip_quality_loss": 0.1}, "This server was started without quality_loss"),
    ],
)
def test_wrong_request_options_are_http_400_and_the_server_goes_on(server, options, sentence):
    prompt = make_context(np.random.default_rng(11), 600).tokens.tolist()
    with pytest.raises(urllib.error.HTTPError) as refused:
        next(server.stream(prompt, 4, vllm_xargs=options))
    assert refused.value.code == 400
    assert sentence in json.loads(refused.value.read())["error"]["message"]
    assert list(server.stream(prompt, 4, vllm_xargs={"kvzip_context_tokens": 600}))


WORDS = make_context(np.random.default_rng(16), 300).text
CHAT = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 4}
RESPONSE = {"input": WORDS, "max_output_tokens": 16}
COMPLETION = {"prompt": WORDS, "max_tokens": 4}
ROUTES = {
    "completions": ("/v1/completions", COMPLETION),
    "completions, two prompts": ("/v1/completions", {**COMPLETION, "prompt": [WORDS, WORDS]}),
    "completions, two samples": ("/v1/completions", {**COMPLETION, "n": 2}),
    "completions, streamed": ("/v1/completions", {**COMPLETION, "stream": True}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat, streamed": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "chat, batch": (
        "/v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"], CHAT["messages"]]},
    ),
    "responses": ("/v1/responses", RESPONSE),
    "responses, streamed": ("/v1/responses", {**RESPONSE, "stream": True}),
    "responses, background": ("/v1/responses", {**RESPONSE, "background": True}),
    "responses, both": ("/v1/responses", {**RESPONSE, "background": True, "stream": True}),
    "messages": ("/v1/messages", CHAT),
    "messages, streamed": ("/v1/messages", {**CHAT, "stream": True}),
}  # fmt: skip
BEAMS = {"use_beam_search": True, "n": 2, "temperature": 0}
LABELS = {"query": WORDS, "items": ["a"], "label_token_ids": [1, 2]}


def refusal(server, path, body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(path, **body)
    assert refused.value.code == 400
    return json.loads(refused.value.read())["error"]["message"]


@pytest.mark.versions
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kvzip_keep_ratio": 1.5}, "kvzip_keep_ratio=1.5 must be a number"),
        ({"kvzip_context_tokens": 10**6}, "must lie between 0 and the prompt's length"),
    ],
)
def test_every_route_refuses_a_wrong_option_before_it_answers(server, route, options, sentence):
    path, body = ROUTES[route]
    assert sentence in refusal(server, path, {**body, "vllm_xargs": options})


@pytest.mark.versions
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_takes_a_right_one(server, route):
    path, body = ROUTES[route]
    name = 'requests_skipped_total{reason="off_by_request"}'
    before = kvzip(server.metrics(), name)
    assert server.post(path, **body, vllm_xargs={"kvzip": "off"})
    deadline = time.monotonic() + 30  # one in the background may not have begun
    while kvzip(server.metrics(), name) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert kvzip(server.metrics(), name) > before


@pytest.mark.versions
@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("/v1/completions", {**COMPLETION, **BEAMS}, "beam search"),
        ("/v1/chat/completions", {**CHAT, **BEAMS}, "beam search"),
        ("/generative_scoring", LABELS, "scoring labels"),
    ],
)
def test_an_option_that_nobody_would_read_is_refused(server, path, body, what):
    sentence = f"Options of KV compression cannot be combined with {what}"
    for options in ({"kvzip": "off"}, {"kvzip_nonsense": 1}):
        assert sentence in refusal(server, path, {**body, "vllm_xargs": options})
    assert server.post(path, **body, vllm_xargs={"mine": 1})


@pytest.mark.versions
def test_a_request_chooses_its_ratio_or_none_and_is_told_what_became_of_it(server):
    rng = np.random.default_rng(14)
    before = server.metrics()

    def told(length, max_tokens=8, **options):
        prompt = make_context(rng, length).tokens.tolist()
        answer = server.complete(prompt, max_tokens, vllm_xargs=options)
        return (answer["kv_transfer_params"] or {}).get("kvzip")

    assert told(1024, kvzip_keep_ratio=0.5) == {
        "compressed_tokens": 1024, "blocks_before": 32, "blocks_held": 16, "keep_ratio": 0.5,
    }  # fmt: skip
    assert told(1024, kvzip="on")["blocks_held"] == 8  # the server's ratio
    assert told(1024, kvzip="off") == {"left_alone": "off_by_request"}
    assert told(1024, kvzip_keep_ratio=1.0) == {"left_alone": "nothing_to_free"}
    assert told(100, kvzip_keep_ratio=0.5) == {"left_alone": "below_min_prompt_tokens"}
    assert told(1024, 1, kvzip_keep_ratio=0.5) == {"left_alone": "ended_before_decode"}
    assert told(1024) is None  # asks for nothing, and gets what stock vLLM answers
    after = server.metrics()
    freed = kvzip(after, "blocks_freed_total") - kvzip(before, "blocks_freed_total")
    assert freed == 16 + 24 + 24
    for reason in ("off_by_request", "nothing_to_free", "below_min_prompt_tokens"):
        name = f'requests_skipped_total{{reason="{reason}"}}'
        assert kvzip(after, name) - kvzip(before, name) == 1


def test_an_answer_without_compression_is_stock_vllms(server):
    prompt = make_context(np.random.default_rng(15), 1024).tokens.tolist()
    (stock,) = run_job([Request(prompt, 40)]).texts
    off = server.complete(prompt, 40, logprobs=0, vllm_xargs={"kvzip": "off"})["choices"]
    assert off[0]["text"] == stock
    assert len(stock.split()) > 20


@pytest.mark.versions
def test_a_declared_context_is_prefilled_once_over_http(server):
    context = make_context(np.random.default_rng(12), 1024, fact_density=0.3)
    declared = {"kvzip_context_tokens": 1024}
    before = server.metrics()
    keys = list(context.facts)[:8]
    list(server.stream(context.tokens.tolist(), 2, vllm_xargs=declared))
    prompts = [question_prompt(context, key)[0] for key in keys]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: list(server.stream(p, 2, vllm_xargs=declared)), prompts))
    right = [VOCABULARY.words[context.facts[key]] for key in keys]
    found = ["".join(answer).split()[0] for answer in answers]
    assert sum(a == b for a, b in zip(found, right, strict=True)) >= len(keys) - 1
    after = server.metrics()
    assert kvzip(after, "prefix_hits_total") - kvzip(before, "prefix_hits_total") == len(keys)
    hit_tokens = kvzip(after, "prefix_hit_tokens_total") - kvzip(before, "prefix_hit_tokens_total")
    assert hit_tokens == 1024 * len(keys)
    assert kvzip(after, "prefix_entries") >= 1
    assert server.blocks_held() == 0


def test_disconnected_clients_leave_nothing(server):
    prompt = make_context(np.random.default_rng(9), 1000).tokens.tolist()
    for _ in range(3):
        stream = server.stream(prompt, 900)
        next(stream)
        stream.close()
    for _ in range(100):
        if server.blocks_held() == 0:
            break
    assert server.blocks_held() == 0
    assert kvzip(server.metrics(), "kv_bytes_saved") == 0


def test_several_api_servers_report_the_same_counts():
    prompt = make_context(np.random.default_rng(10), 512).tokens.tolist()
    with LocalServer(str(MODEL), "--kv-compression", "kvzip", "--api-server-count", "2") as many:
        for _ in range(3):
            assert list(many.stream(prompt, 8))
        for _ in range(4):  # whichever of them answers
            assert kvzip(many.metrics(), "requests_compressed_total") == 3
            assert kvzip(many.metrics(), "blocks_freed_total") == 3 * 8
        for _ in range(4):
            with pytest.raises(urllib.error.HTTPError):
                next(many.stream(prompt, 4, vllm_xargs={"kvzip_context_tokens": "many"}))
