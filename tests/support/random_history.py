"""A random history of requests over vLLM's own block pool, with both sides of the plugin.

A small scheduler drives vLLM's `KVCacheManager` with our spec: chunked prefill, decode, guesses,
prefix hits, preemption, resumption, aborts at any moment and resets. The worker's side sees what a
worker would see, and notes what is stored in every slot of the cache.
"""

import random
from collections import Counter

from cache_manager import build_cache
from most_held import most_blocks
from scheduler_steps import new_request, output
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import options
from vllm_kvzip.vllm_bridge.scheduler.room import next_stop
from vllm_kvzip.vllm_bridge.step_message import attach, attached
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker

BLOCK, NUM_BLOCKS, CHUNK, TTL_STEPS = 16, 56, 48, 60


class World:
    """Scheduler, pool and worker of one random history."""

    def __init__(self, seed, directory, asynchronous, budgets, **rule):
        self.random = random.Random(seed)
        prefill_blocks, decode_blocks, self.most_guesses = budgets
        self.longest = 300 if prefill_blocks is None else 1500  # the pool holds 880 tokens
        self.most_output = 160 if decode_blocks is None else 500
        self.names_budgets = decode_blocks is not None
        self.abort_share = 0.05  # of the steps
        self.asynchronous = asynchronous  # the next step is scheduled before the last is processed
        keep_ratio = self.random.choice([0.2, 0.5, 1.0])
        reuse = ReuseRule(
            fingerprint="00" * 16,
            prefer_raw=self.random.random() < 0.2,
            ttl_seconds=self.random.choice([None, TTL_STEPS]),
        )
        self.cache, self.manager, self.hasher = build_cache(
            directory,
            BLOCK,
            NUM_BLOCKS,
            reuse,
            keep_ratio=keep_ratio,
            min_prompt_tokens=40,
            min_output_tokens=self.random.choice([0, 0, 20]),
            prefill_blocks=prefill_blocks,
            decode_blocks=decode_blocks,
            num_guessed_tokens=2 * self.most_guesses,
            **rule,
        )
        self.now = 0
        self.manager.prefixes._clock = lambda: self.now
        self.waiting, self.running = [], []
        self.requests = {}
        self.tracker = RequestTracker(self.manager.rule, CompressedGroup(0, ("a layer",), (BLOCK,)))
        self.pending, self.rows = [], {}  # the worker's
        self.slots = {}  # (block, offset) -> what was written there
        self.runs = {}  # serial -> (block ids, boundary, keep ratio, plan)
        self.on_run = {}  # request on a compressed prefix -> (its blocks, boundary, keep ratio)
        self.last_scheduled = {}
        self.accepted = {}  # guesses of the step that are right, by request that guesses
        self.done = []  # finished in the last step
        self.events = Counter()
        self.number = 0

    def live(self):
        """Requests come for a while, and all of them end; the pool adds up after every step."""
        for number in range(2400):
            if number >= 400:
                if not (self.running or self.waiting):
                    break
            elif self.random.random() < 0.25 and number < 330:
                self.add()
            self.step()
            self.check_pool()

    def add(self):
        documents = [0, 64, 100, 144]
        size = self.random.choice(documents)
        stem = [1 + self.random.randrange(2)] * size
        rest = self.random.randint(1, self.random.choice([90, self.longest - 210]))
        prompt = stem + [self.random.randrange(1000) for _ in range(rest)]
        if self.running and self.random.random() < 0.15:  # a chat goes on after its answer
            prompt = [*self.random.choice(self.running).all_token_ids, 7, 8]
        prompt = prompt[: self.longest]
        context = self.random.choice([None, size, min(size, 64)])
        options = {} if context is None else {"kvzip_context_tokens": context}
        if self.random.random() < 0.3:
            options["kvzip_keep_ratio"] = self.random.choice([0.3, 0.7, 0.9, 1.0])
        if self.random.random() < 0.1:
            options["kvzip"] = "off"
            prompt = prompt[:300]
        if self.names_budgets and self.random.random() < 0.3:
            options["kvzip_decode_budget"] = self.random.choice([48, 80, 160])
        output = self.random.randint(1, 160 if "kvzip" in options else self.most_output)
        params = SamplingParams(max_tokens=output, extra_args=options)
        request = Request(
            str(self.number), prompt, params, None, block_hasher=self.hasher,
            cache_salt=self.random.choice([None, None, None, "salt"]),
        )  # fmt: skip
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.number += 1

    def _next_stop(self, request, first, count):
        plan, must_wait = self.manager.plan_ahead(request)
        return next_stop(self.manager, request, plan, must_wait, first, count)

    def step(self):
        self.now += 1
        finished = self._abort_some()
        if not self.running and self.random.random() < 0.2 and self.cache.reset_prefix_cache():
            self.manager.prefixes.clear()
            self.events["reset"] += 1
        for request in self.running:
            in_flight = self.last_scheduled.get(request.request_id, 0)
            request.num_in_flight_tokens = in_flight if self.asynchronous else 0
        self.cache.new_step_starts()
        scheduled, running, preempted = {}, [], []
        if len(self.running) > 1 and self.random.random() < self.abort_share / 5:  # as by priority
            victim = self.running.pop()
            self._preempt(victim)
            preempted.append(victim.request_id)
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted by an earlier one of this step
            left = request.num_tokens - request.num_computed_tokens
            guesses = self.random.randint(0, self.most_guesses) if left == 1 else 0
            count = min(CHUNK, left + guesses)
            count = self._next_stop(request, request.num_computed_tokens, count)
            if not count:
                self.events["waited for a fold"] += 1
                continue
            self._guess(request, count - left)
            blocks = self.cache.allocate_slots(request, count)
            while blocks is None:
                victim = self.running.pop()
                self._preempt(victim)
                preempted.append(victim.request_id)
                scheduled.pop(victim.request_id, None)
                running = [item for item in running if item[0] != victim.request_id]
                if victim is request:
                    break
                blocks = self.cache.allocate_slots(request, count)
            if blocks is not None:
                ids = blocks.get_block_ids(allow_none=True)
                running.append(
                    (request.request_id, request.num_computed_tokens, ids and list(ids[0]))
                )
                scheduled[request.request_id] = count
        new, resumed = [], []
        while self.waiting and not preempted:
            request = self.waiting[0]
            hit, num_hit, _ = self.cache.get_computed_blocks(request)
            count = min(CHUNK, request.num_tokens - num_hit)
            count = self._next_stop(request, num_hit, count)
            request.num_in_flight_tokens = 0
            granted = self.cache.allocate_slots(
                request, count, num_new_computed_tokens=num_hit, new_computed_blocks=hit,
                full_sequence_must_fit=True,
            )  # fmt: skip
            if granted is None:
                break
            self.events["prefix hit"] += num_hit > 0
            ids = list(self.cache.get_block_ids(request.request_id)[0])
            request.num_computed_tokens = num_hit
            if request.status == RequestStatus.PREEMPTED:
                resumed.append(request.request_id)
                running.append((request.request_id, num_hit, ids))
            else:
                data = new_request(request.request_id, request.num_prompt_tokens, ids, num_hit)
                data.prompt_token_ids = request.prompt_token_ids
                data.sampling_params = request.sampling_params
                new.append(data)
            request.status = RequestStatus.RUNNING
            self.running.append(self.waiting.pop(0))
            scheduled[request.request_id] = count
        step = output(new, running, scheduled, finished, resumed, preempted)
        attach(step, self.manager.end_of_schedule(scheduled))
        self._work(step)
        self.last_scheduled = scheduled
        for request in list(self.running):
            count, right = self._settle(request, scheduled.get(request.request_id, 0))
            request.num_computed_tokens += count
            request.append_output_token_ids(right)
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(self.random.randrange(1000))
                if request.num_output_tokens >= request.max_tokens:
                    self.running.remove(request)
                    self.cache.free(request)
                    self.done.append(request.request_id)

    def _guess(self, request, count):
        """Speculative decoding: so many tokens more, of which some turn out to be right."""
        self.accepted.pop(request.request_id, None)
        if count > 0:
            allowed = request.max_tokens - request.num_output_tokens - 1
            right = max(0, min(self.random.randint(0, count), allowed))
            tokens = [self.random.randrange(1000) for _ in range(right)]
            self.accepted[request.request_id] = tokens
            self.events["wrong guess"] += count - right

    def _settle(self, request, count):
        """Tokens of the step that stay, and the right guesses among them."""
        right = self.accepted.pop(request.request_id, None)
        return (count, []) if right is None or not count else (1 + len(right), right)

    def _abort_some(self):
        finished, self.done = self.done, []
        if self.random.random() < self.abort_share and (self.running or self.waiting):
            victim = self.random.choice(self.running + self.waiting)
            (self.running if victim in self.running else self.waiting).remove(victim)
            self.cache.free(victim)
            self.events["abort"] += 1
            finished = [*finished, victim.request_id]
        return finished

    def _preempt(self, request):
        self.cache.free(request)
        self.accepted.pop(request.request_id, None)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)
        self.events["preemption"] += 1

    def _work(self, step):
        """What worker and model runner do with a step."""
        gone = self.tracker.finished(step) | self.tracker.suspended(step)
        for request in self.pending:
            if request.kept_as is not None or request.request_id not in gone:
                self._compact(request)
        for rid in self.tracker.drop_ended(step):
            self.on_run.pop(rid, None)
        for rid in step.finished_req_ids:
            self.rows.pop(rid, None)
        message = attached(step)
        for serial in message.dropped if message else ():
            self.runs.pop(serial, None)
        hits = message.hits if message else {}
        self.tracker.advance(step, {rid: self.runs[serial][3] for rid, serial in hits.items()})
        for new in step.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[0])
        cached = step.scheduled_cached_reqs
        for rid, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if rid in cached.resumed_req_ids:
                self.rows[rid] = []
            self.rows[rid].extend(ids[0] if ids else [])
        for rid, serial in hits.items():
            blocks, boundary, keep_ratio, _ = self.runs[serial]
            assert self.rows[rid][: len(blocks)] == blocks
            options = self.requests[rid].sampling_params.extra_args
            assert keep_ratio == options.get("kvzip_keep_ratio", self.manager.rule.keep_ratio)
            assert "kvzip" not in options
            self.on_run[rid] = (len(blocks), boundary, keep_ratio)
            self.events["compressed hit"] += 1
        self.pending = []
        for request in self.tracker.crossing(step):
            request.kept_as = message.kept.get(request.request_id) if message else None
            request.serial = message.reserved.get(request.request_id) if message else None
            self.pending.append(request)
        for rid, count in step.num_scheduled_tokens.items():
            row = [block.block_id for block in self.manager.req_to_blocks[rid]]
            reservation = self.manager.rows[rid].reservation
            if reservation and self.rows[rid] != row:  # the scheduler folds a step later
                assert self.asynchronous or self.most_guesses
                row = fold_row(row, reservation.run.plan, reservation.start, 0)
                self.events["late fold"] += 1
            self._check_row(rid, row)
            self._compute(rid, count)

    def _check_row(self, rid, row):
        assert self.rows[rid] == row  # the same blocks at the same logical places

    def _compact(self, request):
        plan = request.plan
        rid = request.request_id
        sources = request.block_ids[: plan.num_prefix_blocks]
        tokens = self._chain(self.requests[rid])[: plan.boundary_tokens]
        start = plan.start_blocks * BLOCK
        for position in range(start, plan.boundary_tokens):  # all is still in its place
            kind, token = self.slots[sources[position // BLOCK], position % BLOCK]
            assert token == tokens[position]
            assert kind == "raw" or start
        if start:
            _, boundary, keep_ratio = self.on_run[rid]
            assert boundary == start
            for index, block in enumerate(sources[: plan.held_blocks]):
                assert self.slots[block, 0] == ("run", keep_ratio, tokens[start - 1], index)
            self.events["round"] += plan.is_round
        kept_as = request.kept_as
        self.tracker.folded(request, fold_row(request.block_ids, plan, request.reserve_start, 0))
        targets = self._targets(request, plan)
        for index, block in enumerate(targets):
            for offset in range(BLOCK):
                self.slots[block, offset] = ("run", plan.keep_ratio, tokens[-1], index)
        self.rows[rid] = list(request.block_ids)
        self.on_run[rid] = (len(targets), plan.boundary_tokens, plan.keep_ratio)
        self.events["compression"] += 1
        if kept_as is not None:
            self.runs[kept_as] = (targets, plan.boundary_tokens, plan.keep_ratio, plan)

    def _targets(self, request, plan):
        """The blocks that hold what is kept, of a folded row."""
        return request.block_ids[: plan.num_compressed_blocks]

    def _compute(self, rid, count):
        """Write the step's tokens, then read everything the request attends over."""
        request, row = self.requests[rid], self.rows[rid]
        tokens = list(self._chain(request))
        for token in self.accepted.get(rid, ()):
            tokens.append(hash((tokens[-1], token)))
        tokens += ["a wrong guess"] * (request.num_computed_tokens + count - len(tokens))
        num_compressed, boundary, keep_ratio = self.on_run.get(rid, (0, 0, 1.0))
        how = "over" if boundary else "raw"
        first = request.num_computed_tokens
        assert first >= boundary
        for position in range(first, first + count):
            self.slots[row[position // BLOCK], position % BLOCK] = (how, tokens[position])
        if boundary:
            for index, block in enumerate(row[:num_compressed]):
                for offset in range(BLOCK):
                    kept = ("run", keep_ratio, tokens[boundary - 1], index)
                    assert self.slots[block, offset] == kept
            assert all(block == 0 for block in row[num_compressed : boundary // BLOCK])
            started_here = self.manager.rows[rid].num_raw_tokens is None
            allowed = ("over",) if started_here else ("raw", "over")
        else:
            allowed = ("raw",)
        for position in range(boundary, first + count):
            kind, token = self.slots[row[position // BLOCK], position % BLOCK]
            assert token == tokens[position]
            assert kind in allowed

    def _chain(self, request):
        """For each position, a value that stands for all tokens up to it."""
        known = request.__dict__.setdefault("test_chain", [])
        for token in request.all_token_ids[len(known) :]:
            known.append(hash((known[-1] if known else request.cache_salt, token)))
        return known

    def check_pool(self):
        held = Counter(
            block.block_id
            for row in self.manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        pool = self.cache.block_pool
        assert pool.get_num_free_blocks() + len(held) == NUM_BLOCKS - 1
        assert all(pool.blocks[block].ref_cnt == count for block, count in held.items())
        rows = self.manager.rows
        assert rows.keys() == {rid for rid, row in self.manager.req_to_blocks.items() if row}
        runs = {rid: row.run for rid, row in rows.items() if row.run is not None}
        users = Counter(run.serial for run in runs.values())
        for rid, run in runs.items():
            row = self.manager.req_to_blocks[rid]
            tail = len(row) - run.plan.num_prefix_blocks
            assert run.users == users[run.serial]
            reserved = rows[rid].reservation
            assert sum(not block.is_null for block in row) == len(run.blocks) + tail
            rule, request = self.manager.rule, self.requests[rid]
            most = most_blocks(rule, request.num_prompt_tokens, options(request))
            assert most is None or len(run.blocks) + tail <= most, (run.plan, reserved)
            self.check_answer(rule, request, run, reserved, len(run.blocks) + tail)

    def check_answer(self, rule, request, run, reserved, held):
        """Between two rounds of an answer, its request holds the budget and half of it more."""
        budget = rule.decode_budget(options(request))
        if budget is None or not run.plan.is_round or reserved is not None:
            return
        if run.plan.boundary_tokens > request.num_prompt_tokens:
            exact = self.manager.rule.tiers is None  # else it may take a while to fill the budget
            assert len(run.blocks) == budget if exact else len(run.blocks) <= budget
            assert held <= budget + max(1, budget // 2) + (2 if self.asynchronous else 1)
            self.events["answer within its budget"] += 1
