"""What workers tell of compressions follows the scheduler's order, whatever each of them tried."""

import pytest
import torch
from vllm.v1.outputs import ModelRunnerOutput

from vllm_kvzip.vllm_bridge import outcomes
from vllm_kvzip.vllm_bridge.outcomes import FAILED, NOT_FINITE, WorkerOutcomes, told


@pytest.fixture
def settled(monkeypatch):
    """Numbers that were added up over pipeline stages, by call."""
    calls = []

    def add_up(own):
        calls.append(own.tolist())
        return own

    monkeypatch.setattr(outcomes, "add_up_over_stages", add_up)
    monkeypatch.setattr(outcomes, "get_tensor_model_parallel_world_size", lambda: 1)
    return calls


def output():
    return ModelRunnerOutput(req_ids=[], req_id_to_index={})


def test_outcomes_are_those_of_the_order(settled):
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([7, 8, 9])
    worker.add(9, torch.tensor(False))
    worker.add(8, None)
    worker.settle()
    assert told(worker.attach(output())) == {7: FAILED, 8: None, 9: NOT_FINITE}
    assert len(settled) == 1


def test_a_rank_that_has_forgotten_the_request_settles_as_well(settled):
    """The others wait for it: after a failure they may still try the next round of a request."""
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([7])
    worker.settle()
    assert len(settled) == 1
    assert told(worker.attach(output())) == {7: FAILED}


def test_nothing_is_settled_where_nothing_was_ordered(settled):
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([])
    worker.settle()
    assert settled == []
    assert told(worker.attach(output())) == {}


def test_a_stage_before_the_last_tells_nobody(settled, monkeypatch):
    monkeypatch.setattr(outcomes, "add_up_over_stages", lambda own: None)
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([7])
    worker.settle()
    assert told(worker.attach(output())) == {}


def of_rank(rank, monkeypatch, fits, failed=()):
    """The numbers that one of two ranks adds, for compressions 7, 8 and 9."""
    added = []
    monkeypatch.setattr(outcomes, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(outcomes, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(outcomes, "tensor_model_parallel_all_reduce", lambda own: added.append(own))
    monkeypatch.setattr(outcomes, "add_up_over_stages", lambda own: None)
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([7, 8, 9])
    for serial in (7, 8, 9):
        if serial not in failed:
            worker.add(serial, None, fits.get(serial))
    worker.settle()
    return added[0]


def test_the_rank_that_needs_the_most_blocks_decides(settled, monkeypatch):
    first = of_rank(0, monkeypatch, {7: (4, 0.02), 9: (5, 0.01)})
    second = of_rank(1, monkeypatch, {7: (9, 0.01), 9: (2, 0.02)}, failed=[9])
    monkeypatch.setattr(outcomes, "tensor_model_parallel_all_reduce", lambda own: first + second)
    monkeypatch.setattr(outcomes, "add_up_over_stages", lambda own: own)
    worker = WorkerOutcomes(torch.device("cpu"))
    worker.order([7, 8, 9])
    worker.settle()
    found = told(worker.attach(output()))
    blocks, loss = found[7]
    assert (blocks, loss) == (9, pytest.approx(0.015))
    assert (found[8], found[9]) == (None, FAILED)
