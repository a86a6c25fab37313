"""A random history of requests with a quality loss: workers say how many blocks are needed."""

from random_history import BLOCK, World

from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import options


class PromisedWorld(World):
    """Its workers use some of the blocks that were reserved, and tell how many a step later."""

    def __init__(self, seed, directory, asynchronous):
        super().__init__(seed, directory, asynchronous, (None, None, 0), quality_loss=0.02)
        self.outcomes, self.late = {}, {}

    def add(self):
        super().add()
        if self.random.random() < 0.3:
            asked = self.waiting[-1].sampling_params.extra_args
            asked["kvzip_quality_loss"] = self.random.choice(["off", 0.1])

    def step(self):
        super().step()
        due = self.late if self.asynchronous else self.outcomes
        self.late, self.outcomes = self.outcomes, {}
        before = self.cache.block_pool.get_num_free_blocks()
        assert self.manager.settle(due) == {}
        self.events["given back"] += self.cache.block_pool.get_num_free_blocks() - before

    def _targets(self, request, plan):
        reserved = super()._targets(request, plan)
        if plan.quality_loss is None:
            self.outcomes[request.serial] = None
            return reserved
        num_blocks = self.random.randint(1, len(reserved))
        self.outcomes[request.serial] = num_blocks, plan.quality_loss / 2
        for block in reserved[num_blocks:]:  # a worker may write there while it compacts
            for offset in range(BLOCK):
                self.slots[block, offset] = ("unused", None)
        return reserved[:num_blocks]

    def _check_row(self, rid, row):
        if rid in self.on_run:
            num_blocks, boundary, _ = self.on_run[rid]
            run = self.manager.rows[rid].run or self.manager.rows[rid].reservation.run
            assert run.plan.terms == self.manager.rule.terms(options(self.requests[rid]))
            unused = slice(num_blocks, boundary // BLOCK)
            if run.plan.estimated_loss is not None:  # the scheduler knows
                assert run.plan.num_compressed_blocks == num_blocks
                assert not any(row[unused])
            for held in (row, self.rows[rid]):  # nobody reads what is there
                held[unused] = [0] * len(held[unused])
        super()._check_row(rid, row)
