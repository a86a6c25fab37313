"""Contexts between the cache and files, on the scheduler's side: what comes in, what may leave."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import BoundedSemaphore, Event
from types import SimpleNamespace

import pytest
from cache_manager import build_cache
from engine_job import MODEL
from startup import ON, engine_config, refusal
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from vllm_kvzip.contexts.context_file import StoredContext
from vllm_kvzip.contexts.folder import FileEntry
from vllm_kvzip.errors import ContextFileError, NoContextFileError, NotYetError
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.vllm_bridge.contexts import calls
from vllm_kvzip.vllm_bridge.contexts.identity import context_identity
from vllm_kvzip.vllm_bridge.contexts.source import RunSource
from vllm_kvzip.vllm_bridge.contexts.transfers import MOST_SAVED, ContextTransfers
from vllm_kvzip.vllm_bridge.worker.head_page_runtime import HeadPageRuntime

pytestmark = pytest.mark.vllm

BLOCK, NUM_BLOCKS, TOKENS = 16, 20, list(range(1, 129))


class World:
    """vLLM's cache manager with ours inside."""

    def __init__(self, directory, keeps_tokens=True):
        self.cache, self.manager, self.hasher = build_cache(
            directory, BLOCK, NUM_BLOCKS, ReuseRule("00" * 16, keeps_tokens=keeps_tokens),
            keep_ratio=0.25,
            min_prompt_tokens=64,
        )  # fmt: skip
        self.plan = self.manager.rule.plan(len(TOKENS), RequestOptions(context_tokens=len(TOKENS)))
        self.filled = []

    @property
    def free(self):
        return self.cache.block_pool.get_num_free_blocks()

    def request(self, tokens, **fields):
        params = SamplingParams(max_tokens=2, extra_args={"kvzip_context_tokens": len(TOKENS)})
        return Request("a", tokens, params, None, block_hasher=self.hasher, **fields)

    def adopt(self, fill=None):
        prefix_hash = self.request(TOKENS).block_hashes[self.plan.num_prefix_blocks - 1]
        fill = fill or (lambda serial, blocks: self.filled.append((serial, blocks)))
        self.manager.prefixes.adopt(self.plan, prefix_hash, RunSource(TOKENS), fill)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_what_comes_in_is_found_and_nobody_holds_it(world):
    free = world.free
    world.adopt()
    assert world.free == free
    ((serial, blocks),) = world.filled
    assert len(blocks) == world.plan.num_compressed_blocks == 2
    (run,) = world.manager.prefixes.whole_runs()
    assert (run.serial, run.users, run.source.context_id) == (
        serial,
        0,
        RunSource(TOKENS).context_id,
    )
    assert world.manager.prefixes.has(run.prefix_hash, run.plan)
    asked = world.request([*TOKENS, 500])
    hit, num_tokens, _ = world.cache.get_computed_blocks(asked)
    assert num_tokens == len(TOKENS)
    world.cache.allocate_slots(
        asked, 1, num_new_computed_tokens=num_tokens, new_computed_blocks=hit
    )
    assert world.manager.end_of_schedule({"a"}).hits == {"a": serial}
    world.cache.free(asked)
    assert world.free == free


def test_it_is_evicted_like_any_other(world):
    world.adopt()
    taken = world.cache.block_pool.get_new_blocks(world.free)
    world.manager.prefixes.blocks_taken(taken)
    assert world.manager.prefixes.whole_runs() == []


def test_no_room_is_one_sentence_and_changes_nothing(world):
    taken = world.cache.block_pool.get_new_blocks(world.free - 1)
    with pytest.raises(ContextFileError, match="it needs 2 blocks, and requests leave 1 of"):
        world.adopt()
    assert (world.free, world.filled) == (1, [])
    world.cache.block_pool.free_blocks(taken)
    world.adopt()
    assert len(world.manager.prefixes.whole_runs()) == 1


def test_what_workers_refuse_is_not_cached(world):
    def fails(serial, blocks):
        raise ContextFileError("It cannot be used.")

    free = world.free
    with pytest.raises(ContextFileError, match="cannot be used"):
        world.adopt(fails)
    assert (world.free, world.manager.prefixes.whole_runs()) == (free, [])
    found = world.cache.get_computed_blocks(world.request([*TOKENS, 500]))
    assert found[1] == 0


def test_what_is_still_being_compressed_does_not_leave(world):
    asked = world.request([*TOKENS, 500])
    assert world.cache.allocate_slots(asked, asked.num_tokens) is not None
    ((_, serial),) = world.manager.end_of_schedule({"a"}).kept.items()
    (run,) = world.manager.prefixes.whole_runs()
    assert not world.manager.is_compressed(run)
    world.manager.unconfirmed.settle({serial: None})
    assert world.manager.is_compressed(run)
    assert list(run.source.token_ids) == TOKENS
    assert run.source.stays is None


def test_no_tokens_are_kept_where_contexts_stay(tmp_path):
    world = World(tmp_path, keeps_tokens=False)
    asked = world.request([*TOKENS, 500])
    assert world.cache.allocate_slots(asked, asked.num_tokens) is not None
    assert world.manager.end_of_schedule({"a"}).kept
    (run,) = world.manager.prefixes.whole_runs()
    assert run.source is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cache_salt": "mine"}, "a cache_salt"),
        ({"lora_request": LoRARequest("a", 1, "/a")}, "a LoRA adapter"),
    ],
)
def test_what_a_hash_covers_beside_tokens_is_remembered(world, fields, reason):
    assert RunSource.of(world.request(TOKENS, **fields), 64).stays == reason


def identity(*flags, model=MODEL):
    return context_identity(engine_config(*ON, *flags, model=model), 32)


def test_the_same_model_in_another_folder_is_the_same(tmp_path):
    shutil.copytree(MODEL, tmp_path / "copy")
    plain = identity()
    assert identity(model=tmp_path / "copy") == plain
    assert identity("--max-model-len", "512", "--prefix-caching-hash-algo", "sha256_cbor") == plain


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--dtype", "bfloat16"), "the model's dtype"),
        (("--kv-compression-config.sink_tokens", "8"), "the setting sink_tokens"),
        (("--kv-compression-config.scorer", "keydiff"), "the setting scorer"),
        (("--load-format", "dummy"), "the model's weights"),
        (("--skip-tokenizer-init",), "the tokenizer"),
    ],
)
def test_what_differs_is_named(flags, what):
    plain, other = identity(), identity(*flags)
    assert what in [name for name in plain if plain[name] != other[name]]


DRAFT = json.dumps({"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2})


def core(*flags, groups=1, hasher=object()):  # noqa: B008
    config = engine_config(*ON, *flags)
    cache = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[None] * groups))
    return SimpleNamespace(
        vllm_config=config,
        scheduler=SimpleNamespace(kv_cache_manager=cache),
        request_block_hasher=hasher,
    )


def test_engines_whose_contexts_cannot_travel_say_why(tmp_path):
    with pytest.raises(NoContextFileError, match="start it with the setting contexts_dir"):
        ContextTransfers(core(), None)
    flags = ("--kv-compression-config.contexts_dir", str(tmp_path))
    for wrong, sentence in (
        (core(*flags, "--tensor-parallel-size", "2"), "do not work with tensor_parallel_size 2"),
        (core(*flags, groups=2), "models whose layers differ"),
        (core(*flags, "--speculative-config", DRAFT), "do not work with a draft model"),
        (core(*flags, hasher=None), "Prefix caching is off"),
    ):
        with pytest.raises(ContextFileError, match=sentence):
            ContextTransfers(wrong, None)


def test_a_folder_is_checked_before_the_engine_starts(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    flag = "--kv-compression-config.contexts_dir"
    assert "is no folder that can be used" in refusal(capsys, *ON, flag, str(tmp_path / "file"))
    limit = "--kv-compression-config.contexts_bytes"
    assert "contexts_bytes has no effect" in refusal(capsys, *ON, limit, "1GiB")
    engine_config(*ON, flag, str(tmp_path), limit, "1GiB")


def test_blocks_that_are_still_to_be_compressed_are_not_written():
    """A request that has ended leaves its prompt's blocks, which workers read in the next step."""
    runtime = SimpleNamespace(_complete=[SimpleNamespace(block_ids=[3, 4])])
    assert HeadPageRuntime.will_read(runtime, [7, 4])
    assert not HeadPageRuntime.will_read(runtime, [7, 5])


def test_a_call_waits_for_a_step_where_it_must(monkeypatch):
    answers = [calls._refusal(NotYetError("Not yet.")), calls._refusal(NotYetError("Not yet."))]
    steps = []
    engine = SimpleNamespace(kvzip_place=lambda ticket: answers.pop() if answers else {"id": "a"})
    client = SimpleNamespace(engine_core=engine)
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=client, step=lambda: steps.append(1))
    )
    assert calls._ask_llm(llm, calls.PLACE, 1) == {"id": "a"}
    assert len(steps) == 2
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", -1)
    answers.append(calls._refusal(NotYetError("Not yet.")))
    with pytest.raises(NotYetError, match="Not yet"):
        calls._ask_llm(llm, calls.PLACE, 1)


def transfers(world, folder, **rule):
    """Transfers over a world's cache; copies and files are made up."""
    one = ContextTransfers.__new__(ContextTransfers)
    one._runs = SimpleNamespace(
        rule=replace(world.manager.rule, **rule), prefixes=world.manager.prefixes,
        is_compressed=lambda run: True,
    )  # fmt: skip
    one._workers = SimpleNamespace(is_sleeping=False, collective_rpc=lambda *call, args: ({},))
    one._thread, one._identity, one._folder = ThreadPoolExecutor(1), {}, folder
    one._saving, one._longest = BoundedSemaphore(MOST_SAVED), 4096
    return one


class SlowFolder:
    """Writes when it may."""

    def __init__(self):
        self.may_write = Event()

    def save(self, name, context):
        assert self.may_write.wait(20)
        return FileEntry(name, 7, 0.0)


def test_no_more_contexts_are_copied_than_wait_to_be_written(world):
    world.adopt()
    folder = SlowFolder()
    one, name = transfers(world, folder), RunSource(TOKENS).context_id
    waiting = [one.save(name, None, None) for _ in range(MOST_SAVED)]
    with pytest.raises(NotYetError, match="Other contexts are being written"):
        one.save(name, None, None)
    folder.may_write.set()
    assert [written.result(20)["bytes"] for written in waiting] == [7] * MOST_SAVED
    one._thread.submit(int).result(20)  # behind the callbacks of the last one
    assert one.save(name, None, None).result(20)["id"] == name


def test_a_request_is_told_to_name_the_loss_that_a_context_was_compressed_for(world):
    world.plan = replace(world.plan, quality_loss=0.05)
    world.adopt()
    folder, name = SlowFolder(), RunSource(TOKENS).context_id
    folder.may_write.set()
    told = transfers(world, folder, quality_loss=0.02).save(name, None, None).result(20)
    assert told["send"]["vllm_xargs"]["kvzip_quality_loss"] == 0.05
    told = transfers(world, folder, quality_loss=0.05).save(name, None, None).result(20)
    assert "kvzip_quality_loss" not in told["send"]["vllm_xargs"]
    context = StoredContext(TOKENS, world.plan, {}, {})
    with pytest.raises(ContextFileError, match=r"a was compressed for a quality_loss of 0\.05"):
        transfers(world, folder)._place(FileEntry("a", 7, 0.0), context)
