"""A quality loss reserves the most and gives back what a prompt does not need."""

import pytest
from promised_history import PromisedWorld
from random_history import NUM_BLOCKS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_give_back_what_was_reserved_in_vain(seed, asynchronous, tmp_path):
    world = PromisedWorld(seed, tmp_path, asynchronous)
    world.live()
    for event in ("given back", "compressed hit", "preemption", "abort"):
        assert world.events[event] > 0
    assert world.cache.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not world.manager.rows
    world.step()
    assert len(world.runs) == len(world.manager.prefixes)
