"""Let a real engine compress contexts, and write down the scores that its scorer gave.

    python scoring_job.py JOB ANSWER

JOB is JSON: engine arguments, prompts and their options; ANSWER a file of `torch.save` with the
scores by the seed of the prefix, as many as were scored, and how many segments each repeating pass
had.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path


def main():
    import torch
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    compression = core.model_executor.driver_worker.worker._kvzip._compression
    found, passes = defaultdict(list), []
    scorer = compression._compressor._scorer
    original_score = scorer.score_layer

    def score_layer(inputs):
        scores = original_score(inputs)
        found[inputs.seed].append(scores.clone())
        return scores

    scorer.score_layer = score_layer
    if compression.repeats is not None:
        reconstruction = compression.repeats.reconstruction
        original_forward = reconstruction._forward

        def forward(segments):
            passes.append(len(segments))
            return original_forward(segments)

        reconstruction._forward = forward
    for prompts, options in (job["before"], job["prompts"]):
        params = [
            SamplingParams(
                temperature=0, max_tokens=4, ignore_eos=True, detokenize=False, extra_args=asked
            )
            for asked in options
        ]
        if prompts:
            llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    scores = {seed: torch.stack(layers) for seed, layers in found.items()}
    torch.save({"scores": scores, "passes": passes}, sys.argv[2])


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
