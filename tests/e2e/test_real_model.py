"""What the defaults cost a real language model, measured as a user measures their own.

Four contexts of English prose of 1,024 tokens with three facts each. A context is compressed before
anybody asks. Nats are of the digits that are asked for, beyond the uncompressed model's.
"""

import numpy as np
import pytest
from transformers import AutoTokenizer

from vllm_kvzip.evaluation.quality.run import QualityRun
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame
from vllm_kvzip.evaluation.tasks.text_source import load_text
from vllm_kvzip.evaluation.tasks.text_tasks import facts
from vllm_kvzip.evaluation.tasks.text_weaving import Weaver

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

TOKENS, CONTEXTS, FACTS = 1024, 4, 3


@pytest.fixture(scope="module")
def run(real_model):
    frame = TextFrame.of(AutoTokenizer.from_pretrained(real_model))
    weaver = Weaver(load_text(None, TOKENS, frame), frame)
    rng = np.random.default_rng(29)
    documents = [facts(weaver, rng, TOKENS, FACTS) for _ in range(CONTEXTS)]
    run = QualityRun(real_model, documents, continuation_tokens=8)
    run.uncompressed()
    return run


def lost(run, settings, ratios):
    """Nats a digit, and share of the bytes held, at each keep ratio."""
    measured = run.compressed({"keep_ratio": max(ratios), **settings}, ratios)
    return [(found.lost_nats(run.full).mean, found.held) for found in measured]


# Static head budgets, the default that these figures keep away, lose 0.23 at either ratio; one
# digit of twelve codes that a model doubts moves a mean by several hundredths.
def test_the_default_loses_next_to_nothing(run):
    (half, held), (quarter, less) = lost(run, {}, [0.5, 0.25])
    assert held == pytest.approx(0.5, abs=0.02)
    assert less == pytest.approx(0.25, abs=0.02)
    assert half < 0.1
    assert quarter < 0.15


def test_without_a_profile_neither(run):
    ((half, _), (quarter, _)) = lost(run, {"profile": "none"}, [0.5, 0.25])
    assert half < 0.1
    assert quarter < 0.2


def test_chance_loses_the_answers(run):
    """So the figures above say that the right pairs were kept."""
    ((half, _),) = lost(run, {"profile": "none", "scorer": "random"}, [0.5])
    assert half > 0.3
