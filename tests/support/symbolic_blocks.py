"""vLLM's scheduler and OffloadingConnector over blocks that hold a label of what is in them.

Schedulers, connector and its manager are vLLM's own, with ours inside. A step of the model is
played: it writes labels into the blocks of its rows, in the order in which a worker would.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import torch
from own_scheduler import BLOCK, build_scheduler
from plain_offload import PlainOffloadingSpec, PlainWorker, connector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_offload.base import get_offload_block_hash
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.scheduler.terms import CompressionTerms
from vllm_kvzip.vllm_bridge.step_message import attached
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker

SAMPLED = 7
"""The token that every step samples."""


class SymbolicEngine:
    """An engine core whose worker moves labels.

    Args:
        num_blocks: of the pool.
        lag: steps that are scheduled before the first has run.
        fails: serial of a run -> whether its compression fails.
        extra: settings of the connector.
        engine: arguments of the engine.

    Attributes:
        wrong: what was found in a block where something else should be.
        num_checked: blocks that were looked at.
    """

    def __init__(self, num_blocks, lag=0, fails=lambda serial: False, extra=None, **engine):
        PlainOffloadingSpec.managers.clear()
        self.scheduler = build_scheduler(
            num_blocks, async_scheduling=lag > 0, kv_transfer_config=connector(**(extra or {})),
            kvzip={"keep_ratio": 0.5, "min_prompt_tokens": 64}, **engine,
        )  # fmt: skip
        config, groups = self.scheduler.vllm_config, self.scheduler.kv_cache_config
        spec = PlainOffloadingSpec(build_offloading_config(config, groups))
        self.manager = self.scheduler._kvzip_manager
        self._labels: list[tuple] = [("nothing",)]
        self._numbers = {("nothing",): 0}
        self._memory = torch.zeros(num_blocks, 1, dtype=torch.int64)
        self.host = PlainWorker(
            SimpleNamespace(tensors=[SimpleNamespace(tensor=self._memory)]), spec.blocks_per_chunk
        )
        self._blocks_per_chunk = spec.blocks_per_chunk
        self._connector = OffloadingConnectorWorker(spec, config, groups)
        self._connector.worker = self.host
        self._tracker = RequestTracker(
            self.manager.rule, CompressedGroup.find(groups, CompressionTerms)
        )
        self._complete: list = []
        self._plans: dict = {}
        self._lag, self._fails = lag, fails
        self._steps: deque = deque()
        self._ordered: dict[int, tuple] = {}
        self._failed: set[int] = set()
        self.requests: dict[str, object] = {}
        self.wrong: list[tuple] = []
        self.num_checked = 0

    def add(self, request):
        """A request arrives."""
        self.requests[request.request_id] = request
        self.scheduler.add_request(request)

    def abort(self, request_id):
        """A request is aborted between two steps."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def can_reset(self):
        """Whether vLLM's cache can be reset: only running requests hold blocks, between steps."""
        running = {request.request_id for request in self.scheduler.running}
        return self.manager.req_to_blocks.keys() <= running and not self._steps

    def step(self):
        """Schedule a step; run and process the oldest that is due."""
        output = self.scheduler.schedule()
        samples = [
            [] if self.scheduler.requests[request_id].is_prefill_chunk else [SAMPLED]
            for request_id in output.num_scheduled_tokens
        ]
        self._steps.append((output, samples, self._writes(output), self._orders(output)))
        if len(self._steps) > self._lag:
            self._run(*self._steps.popleft())

    def check_host(self):
        """Every block in host memory must be raw, and of the tokens that its hash covers."""
        tokens_of = {
            hash_: tuple(request.all_token_ids[: (index + 1) * BLOCK])
            for request in self.requests.values()
            for index, hash_ in enumerate(request.block_hashes)
        }
        (manager,) = PlainOffloadingSpec.managers
        for chunk, parts in self.host.chunks.items():
            tokens = tokens_of[get_offload_block_hash(manager.key_of_chunk[chunk])]
            first = len(tokens) - self._blocks_per_chunk * BLOCK
            for part, (number,) in parts.items():
                self._expect(int(number), ("raw", tokens[: first + (part + 1) * BLOCK]), "host")

    def _expect(self, number, expected, where):
        self.num_checked += 1
        found = self._labels[number]
        if found != expected:
            self.wrong.append((where, found[:1], found[1:2], expected))

    def _put(self, block, label):
        if label not in self._numbers:
            self._numbers[label] = len(self._labels)
            self._labels.append(label)
        self._memory[block] = self._numbers[label]

    def _orders(self, output):
        """Compressions that the step orders: run -> blocks that are read, and what they hold."""
        orders = {}
        for request_id, serial in attached(output).reserved.items():
            row = self.manager.rows[request_id]
            run = row.reservation.run
            blocks = self.manager.req_to_blocks[request_id][: run.plan.num_prefix_blocks]
            orders[serial] = (
                [block.block_id for block in blocks],
                [block.block_id for block in run.blocks],
                row.request,
            )
            self._plans[serial] = run.plan
        return orders

    def _writes(self, output):
        """What the step computes: request, first and last token, its row and how it begins."""
        writes = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            row = self.manager.rows[request_id]
            blocks = [block.block_id for block in self.manager.req_to_blocks[request_id]]
            end = request.num_computed_tokens  # counted as computed already
            is_raw = row.run is None and (row.num_raw_tokens is None or end <= row.num_raw_tokens)
            if row.reservation is not None:
                start, num = row.reservation.start, len(row.reservation.run.blocks)
                blocks = blocks[:start] + blocks[start + num :]
            run = row.run or (row.reservation.run if row.reservation else None)
            writes.append(
                (request, end - num_tokens, end, blocks, is_raw, run, row.run is not None)
            )
        return writes

    def _run(self, output, samples, writes, orders):
        meta = output.kv_connector_metadata
        outcomes = {}
        for serial, (sources, targets, request) in self._ordered.items():
            for index, block in enumerate(sources):
                tokens = tuple(request.all_token_ids[: (index + 1) * BLOCK])
                self._expect(int(self._memory[block]), ("raw", tokens), "compaction")
            for block in targets:
                self._put(block, ("run", serial))
            outcomes[serial] = FAILURES[1] if self._fails(serial) else None
            if outcomes[serial]:
                self._failed.add(serial)
        self._follow(output, orders)
        self._ordered = orders
        self._connector.handle_preemptions(meta)
        self._connector.start_kv_transfers(meta)
        for write in writes:
            self._forward(*write)
        self._connector.prepare_store_kv(meta)
        sending, receiving = self._connector.get_finished(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=sending,
            finished_recving=receiving,
            kv_connector_worker_meta=self._connector.build_connector_worker_meta(),
        )
        ids = list(output.num_scheduled_tokens)
        places = {request_id: place for place, request_id in enumerate(ids)}
        result = ModelRunnerOutput(ids, places, samples, kv_connector_output=told)
        result.kvzip_outcomes = outcomes
        self.scheduler.update_from_output(output, result)

    def _follow(self, output, orders):
        """A worker's own idea of rows must be the scheduler's; as ``HeadPageRuntime`` has it."""
        message, tracker = attached(output), self._tracker
        gone = tracker.finished(output) | tracker.suspended(output)
        for request, serial, is_kept in self._complete:
            if is_kept or request.request_id not in gone:
                plan, start = request.plan, request.reserve_start
                tracker.folded(request, fold_row(request.block_ids, plan, start, 0))
            if serial in self._failed:
                tracker.forget(request.request_id)
        tracker.drop_ended(output)
        for request_id in message.left_alone:
            tracker.forget(request_id)
        known = {
            request_id: self._plans[serial]
            for request_id, serial in message.hits.items()
            if serial not in self._failed
        }
        tracker.advance(output, known)
        for request_id in message.hits.keys() - known.keys():
            tracker.forget(request_id)
        crossing = {request.request_id: request for request in tracker.crossing(output)}
        if crossing.keys() != message.reserved.keys():
            self.wrong.append(("tracker", set(crossing), set(message.reserved), output))
        self._complete = []
        for request_id, serial in message.reserved.items():
            if request := crossing.get(request_id):
                self._complete.append((request, serial, request_id in message.kept))
                if request.block_ids[request.reserve_start :] != orders[serial][1]:
                    self.wrong.append(("reserve", request_id, request.block_ids, orders[serial]))

    def _forward(self, request, start, end, blocks, is_raw, run, is_folded):
        known = list(request.all_token_ids[:end])
        tokens = tuple(known + [SAMPLED] * (end - len(known)))
        if run is not None and run.serial in self._failed:
            is_raw = False  # whatever it computes is taken back
        elif is_folded:
            for block in run.blocks:
                self._expect(int(self._memory[block.block_id]), ("run", run.serial), "run")
        elif is_raw:
            for index in range(start // BLOCK):
                number = int(self._memory[blocks[index]])
                self._expect(number, ("raw", tokens[: (index + 1) * BLOCK]), "raw prefix")
        for index in range(start // BLOCK, -(-end // BLOCK)):
            last = min(end, (index + 1) * BLOCK)
            before = self._labels[int(self._memory[blocks[index]])]
            continues = start <= index * BLOCK or any(
                before == ("raw", tokens[:length]) for length in range(start, last + 1)
            )
            kind = "raw" if is_raw and continues else "other"
            self._put(blocks[index], (kind, tokens[:last]))
