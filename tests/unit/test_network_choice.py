"""Of networks trained towards several targets, those that cost the model least are taken."""

import numpy as np
import pytest
import torch
from engine_job import MODEL

from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context
from vllm_kvzip.profiling.context_cache import layers_of
from vllm_kvzip.profiling.masked_model import MaskedModel
from vllm_kvzip.profiling.network_choice import NetworkChoice


@pytest.mark.parametrize("right", ["influence", "attention"])
def test_the_target_that_tells_what_matters_is_taken(right):
    """One target holds the model's own scores, the other the same ones turned round."""
    model = MaskedModel(str(MODEL))
    repeat = [VOCABULARY.ids["repeat"]]
    contexts = [make_context(np.random.default_rng(s), 512).tokens.tolist() for s in range(3)]
    choice = NetworkChoice(model, 512, width=8, seed=0)
    for context in contexts[:2]:
        cache = model.read(context)
        scores = model.score(context, 512, repeat, repeat, cache=cache)
        targets = {"influence": 1 - scores, "attention": 1 - scores, right: scores}
        influence, attention = (targets[name] + 1e-4 for name in ("influence", "attention"))
        choice.add(layers_of(cache), influence, influence, attention)
    networks = choice.best(contexts[2], model.read(contexts[2]), repeat)
    assert choice.target == right
    assert len(networks) == model.fingerprint.num_layers
    assert [line.endswith("(taken)") for line in choice.report] == [
        target == right for target in ("influence", "attention")
    ]
    assert torch.stack([network.out_bias for network in networks]).isfinite().all()
