"""Events about the KV cache: what subscribers were told is what they would find.

vLLM's scheduler with our additions, over blocks that hold nothing. A subscriber adds what is stored
and takes away what is removed; after every step it must have exactly the raw blocks in the pool.
"""

import pytest
from own_scheduler import build_scheduler, request, step
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

pytestmark = pytest.mark.vllm


class Subscriber:
    """Takes in the events of a scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.stored, self.unknown, self.reported = set(), [], []
        self.num_removed = 0
        scheduler.kv_event_publisher.publish = self.take

    def take(self, batch):
        for event in batch.events:
            if isinstance(event, BlockStored):
                self.reported.append(event)
                self.stored |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.num_removed += len(event.block_hashes)
                self.unknown += set(event.block_hashes) - self.stored
                self.stored -= set(event.block_hashes)

    def raw_hashes(self):
        """Of the pool's blocks; also of those that nobody uses any more."""
        manager = self.scheduler._kvzip_manager
        keys = {block.block_hash for block in manager.block_pool.blocks if block.block_hash}
        assert any(manager.prefixes.made(key) for key in keys) == bool(manager.prefixes)
        raw = {key for key in keys if not manager.prefixes.made(key)}
        return {maybe_convert_block_hash(get_block_hash(key)) for key in raw}


def run(scheduler, subscriber, *requests):
    """Serve requests to their end; returns those that started from the prefix cache."""
    for one in requests:
        scheduler.add_request(one)
    while scheduler.has_unfinished_requests():
        step(scheduler)
        assert subscriber.unknown == []
    assert subscriber.stored == subscriber.raw_hashes()


@pytest.fixture
def scheduler():
    return build_scheduler(
        24,
        kvzip={"scorer": "keydiff", "budget": "uniform", "min_prompt_tokens": 64},
        async_scheduling=False,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )


def test_subscribers_know_the_raw_blocks(scheduler):
    subscriber = Subscriber(scheduler)
    run(scheduler, subscriber, request("a", 200))
    assert len(subscriber.stored) == 6  # whole blocks of the prompt, none of the dense tail
    assert len(scheduler._kvzip_manager.prefixes) == 1
    for number, name in enumerate("bcdefgh"):  # until everything of "a" has been evicted
        run(scheduler, subscriber, request(name, 180 + number))
    assert subscriber.num_removed > 6


def test_a_reused_compressed_prefix_is_not_reported_as_raw_blocks(scheduler):
    subscriber = Subscriber(scheduler)
    run(scheduler, subscriber, request("a", 200))
    again = request("a", 200)
    again.kv_cache_report_mode = "full"
    hits = []
    owner = scheduler._kvzip_manager.prefixes.owner
    scheduler._kvzip_manager.prefixes.owner = lambda blocks: hits.append(owner(blocks)) or hits[-1]
    subscriber.reported.clear()
    run(scheduler, subscriber, again)
    assert any(hits)
    assert subscriber.reported == []


def test_reused_raw_blocks_are_reported(scheduler):
    subscriber = Subscriber(scheduler)
    run(scheduler, subscriber, request("a", 63))  # too short to be compressed
    again = request("a", 50)
    again.kv_cache_report_mode = "full"
    subscriber.reported.clear()
    run(scheduler, subscriber, again)
    assert [len(event.block_hashes) for event in subscriber.reported] == [1]
