"""Requests to copy a part of a context, long and short ones, for runs that are compared."""

import numpy as np
from engine_job import Request

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context


def copy_requests():
    rng = np.random.default_rng(6)
    contexts = [make_context(rng, n) for n in (400, 70, 700, 512)]
    return [
        Request(copy_prompt(context, 20)[0], 24, arrives=2 * i)
        for i, context in enumerate(contexts)
    ]
