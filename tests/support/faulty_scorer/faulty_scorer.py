"""A scorer of another package, for tests: it fails on prompts of one length."""

from vllm_kvzip.scoring.surrogate import SurrogateScorer

FAILS_AT = 777


class FaultyScorer(SurrogateScorer):
    name = "faulty"

    def score_layer(self, inputs):
        if inputs.num_context_tokens == FAILS_AT // 32 * 32:
            raise RuntimeError("a fault of its own")
        return super().score_layer(inputs)
