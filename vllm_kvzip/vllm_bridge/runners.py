"""What differs between vLLM's model runners: who is in which row, and how a row is rewritten.

The plugin supports model runner V1 today, which serves the CPU. A second runner gets a second class
here and nothing else changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RunnerV1:
    """Adapter of model runner V1 (``v1/worker/gpu_model_runner.py`` and its CPU subclass).

    Args:
        runner: vLLM's runner.
        group_id: the KV cache group of the compressed layers.
    """

    def __init__(self, runner: GPUModelRunner, group_id: int = 0) -> None:
        self._runner = runner
        self._group_id = group_id

    def request_ids(self) -> list[str]:
        """Request ids in row order of the current batch."""
        return list(self._runner.input_batch.req_ids)

    def replace_row(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Make ``block_ids`` the block table row of a request, in the batch and out of it.

        The cached request keeps its own copy of the row, from which vLLM rebuilds the batch row
        when the request was left out of a step.
        """
        state = self._runner.requests[request_id]
        state.block_ids[self._group_id][:] = block_ids
        row = self._runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            table = self._runner.input_batch.block_table[self._group_id]
            table.clear_row(row)
            table.add_row(list(block_ids), row)
