"""vLLM's OffloadingConnector on a CPU: all of it is vLLM's own, but the copies.

vLLM copies blocks on CUDA streams. Here they are copied as late as a stream may copy them: a
transfer runs when the step after the one that ordered it has been computed, or when the connector
waits for it because a block is about to be overwritten.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


def connector(megabytes: float = 64, **extra: Any) -> dict[str, Any]:
    """``kv_transfer_config`` of an engine with it; ``extra`` is the connector's own."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": int(megabytes * 2**20),
            "spec_name": "PlainOffloadingSpec",
            "spec_module_path": "plain_offload",
            "offload_prompt_only": False,
            **extra,
        },
    }


class PlainOffloadingSpec(CPUOffloadingSpec):
    """vLLM's, with copies in plain memory."""

    managers: ClassVar[list[RecordingManager]] = []
    workers: ClassVar[list[PlainWorker]] = []

    def get_manager(self):
        made = super().get_manager()
        if not isinstance(made, RecordingManager):
            made.__class__ = RecordingManager
            made.key_of_chunk = {}
            self.managers.append(made)
        return made

    def get_worker(self, kv_caches):
        worker = PlainWorker(kv_caches, self.blocks_per_chunk)
        self.workers.append(worker)
        return worker


class RecordingManager(CPUOffloadingManager):
    """vLLM's, which remembers the key of each chunk.

    Attributes:
        key_of_chunk: of the last store into it.
    """

    key_of_chunk: dict[int, bytes]

    def prepare_store(self, keys, *args, **kwargs):
        output = super().prepare_store(keys, *args, **kwargs)
        if output is not None:
            chunks = output.store_spec.block_ids.tolist()
            self.key_of_chunk |= dict(zip(chunks, output.keys_to_store, strict=True))
        return output


class PlainWorker(OffloadingWorker):
    """Copies between vLLM's cache and host memory.

    Attributes:
        chunks: chunk number -> its blocks -> bytes of each tensor.
        num_loaded: blocks that were loaded.
    """

    def __init__(self, kv_caches, blocks_per_chunk):
        self._tensors = [one.tensor for one in kv_caches.tensors]
        self._blocks_per_chunk = blocks_per_chunk
        self._waiting: dict[int, tuple[bool, Any, Any, int]] = {}
        self._done: list[int] = []
        self.chunks: dict[int, dict[int, list[torch.Tensor]]] = {}
        self.num_loaded = 0

    def submit_store(self, job_id, src_spec, dst_spec):
        self._waiting[job_id] = (True, src_spec, dst_spec, 1)
        return True

    def submit_load(self, job_id, src_spec, dst_spec):
        self._waiting[job_id] = (False, dst_spec, src_spec, 1)
        return True

    def wait(self, job_ids):
        for job_id in sorted(job_ids):
            self._run(job_id)

    def get_finished(self):
        """Called once the step has been computed."""
        for job_id, (is_store, ours, theirs, steps) in list(self._waiting.items()):
            if steps:
                self._waiting[job_id] = (is_store, ours, theirs, steps - 1)
            else:
                self._run(job_id)
        done, self._done = self._done, []
        return [TransferResult(job_id, success=True) for job_id in done]

    def _run(self, job_id):
        if job_id not in self._waiting:
            return
        is_store, ours, theirs, _ = self._waiting.pop(job_id)
        self._done.append(job_id)
        (first,) = ours.block_indices
        for place, block in enumerate(ours.block_ids.tolist(), start=first):
            number = place // self._blocks_per_chunk - first // self._blocks_per_chunk
            chunk = self.chunks.setdefault(int(theirs.block_ids[number]), {})
            part = place % self._blocks_per_chunk
            if is_store:
                chunk[part] = [tensor[block].clone() for tensor in self._tensors]
            else:
                self.num_loaded += 1
                for tensor, stored in zip(self._tensors, chunk[part], strict=True):
                    tensor[block] = stored


def dump(path: str) -> None:
    """Write what is kept of each chunk, float32 under the name of its key, and ``num_loaded``."""
    (manager,), (worker,) = PlainOffloadingSpec.managers, PlainOffloadingSpec.workers
    content = {
        manager.key_of_chunk[chunk].hex(): torch.stack(
            [torch.stack(blocks[part]) for part in sorted(blocks)]
        ).view(torch.float32).numpy()
        for chunk, blocks in worker.chunks.items()
    }  # fmt: skip
    np.savez(path, num_loaded=worker.num_loaded, **content)
