"""What differs between vLLM's model runners: who is in which row, and how a row is rewritten.

Runner V1 serves the CPU, runner V2 is vLLM's choice on CUDA. Nothing else of the plugin knows of
either.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
    from vllm_kvzip.vllm_bridge.symbols import (
        CommonAttentionMetadata,
        GPUModelRunner,
        GPUModelRunnerV2,
        InputBatch,
    )


class Rows(Protocol):
    """The block table rows of a model runner, in the compressed KV cache group."""

    def request_ids(self, common: CommonAttentionMetadata) -> list[str]:
        """Request ids of the current batch, in row order."""
        ...

    def replace_row(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Make ``block_ids`` the row of a request, from the step on that is about to run."""
        ...


class RunnerV1:
    """Adapter of model runner V1 (``v1/worker/gpu_model_runner.py`` and its CPU subclass).

    Args:
        runner: vLLM's runner.
        group: whose rows these are.
    """

    def __init__(self, runner: GPUModelRunner, group: CompressedGroup) -> None:
        self._runner = runner
        self._group_id = group.group_id

    def request_ids(self, common: CommonAttentionMetadata) -> list[str]:
        """See :class:`Rows`."""
        return list(self._runner.input_batch.req_ids[: common.num_reqs])

    def replace_row(self, request_id: str, block_ids: Sequence[int]) -> None:
        """See :class:`Rows`.

        The cached request keeps its own copy of the row, from which vLLM rebuilds the batch row
        when the request was left out of a step. On a GPU the step before may still have to copy
        that batch row to the device; vLLM waits for the same event a moment later.
        """
        copied = getattr(self._runner, "prepare_inputs_event", None)
        if copied is not None:
            copied.synchronize()
        state = self._runner.requests[request_id]
        state.block_ids[self._group_id][:] = block_ids
        row = self._runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            table = self._runner.input_batch.block_table[self._group_id]
            table.clear_row(row)
            table.add_row(list(block_ids), row)


class RunnerV2:
    """Adapter of model runner V2 (``v1/worker/gpu/model_runner.py``).

    A request keeps one slot as long as it lives, and its row is in that slot.

    Symptom without the wrapper in it: vLLM's metadata says nothing of requests where a model has
    recurrent layers. One method of one object is wrapped; it passes everything on unchanged. Remove
    when ``CommonAttentionMetadata`` names the requests of every model.

    Args:
        runner: vLLM's runner.
        group: whose rows these are.
    """

    def __init__(self, runner: GPUModelRunnerV2, group: CompressedGroup) -> None:
        self._runner = runner
        self._group_id = group.group_id
        self._batch: list[str] = []
        vllms = runner.model_state.prepare_attn

        @functools.wraps(vllms)
        def prepare_attn(input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
            self._batch = input_batch.req_ids
            return vllms(input_batch, *args, **kwargs)

        runner.model_state.prepare_attn = prepare_attn

    def request_ids(self, common: CommonAttentionMetadata) -> list[str]:
        """See :class:`Rows`; ids that nobody has when vLLM only warms up."""
        return self._batch

    def replace_row(self, request_id: str, block_ids: Sequence[int]) -> None:
        """See :class:`Rows`.

        Written in the device's stream at once, not through vLLM's staged writes. These have room
        for one write per slot and step, and vLLM needs it: it appends the blocks of this step,
        starting at the length that is set here.
        """
        slot = self._runner.req_states.req_id_to_index.get(request_id)
        if slot is not None:
            tables = self._runner.block_tables
            row = tables.block_tables[self._group_id].gpu[slot]
            async_tensor_h2d(list(block_ids), out=row[: len(block_ids)])
            tables.num_blocks.np[self._group_id, slot] = len(block_ids)


def adapt(runner: GPUModelRunner | GPUModelRunnerV2, group: CompressedGroup) -> Rows:
    """The adapter that fits a runner.

    Args:
        runner: vLLM's runner.
        group: whose rows it reads and writes.
    """
    if hasattr(runner, "req_states"):
        return RunnerV2(runner, group)
    return RunnerV1(runner, group)
