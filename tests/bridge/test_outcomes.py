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
