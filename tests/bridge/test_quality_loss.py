"""A quality loss reserves the most and gives back what a prompt does not need."""

import pytest
from promised_history import PromisedWorld
from random_history import NUM_BLOCKS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_give_back_what_was_reserved_in_vain(seed, asynchronous, tmp_path):
    world = PromisedWorld(seed, tmp_path, asynchronous)
    for step in range(400):
        if world.random.random() < 0.25 and step < 330:
            world.add()
        world.step()
        world.check_pool()
    for _ in range(2000):
        if not (world.running or world.waiting):
            break
        world.step()
        world.check_pool()
    for event in ("given back", "compressed hit", "preemption", "abort"):
        assert world.events[event] > 0
    assert world.cache.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not world.manager.rows
    world.step()
    assert len(world.runs) == len(world.manager.prefixes)
