"""Let a real engine score contexts by repeating them, and write down what it found.

    python scoring_job.py JOB ANSWER

JOB is JSON: engine arguments and prompts; ANSWER a file of `torch.save` with the scores by prompt,
as many as were scored, and how many forward passes it took.
"""

import json
import os
import sys
from pathlib import Path


def main():
    import torch
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    runtime = core.model_executor.driver_worker.worker._kvzip
    found, passes = {}, []
    original_run = runtime._reconstruction.run
    original_forward = runtime._reconstruction._forward

    def run(prefixes):
        scored = original_run(prefixes)
        for (token_ids, _), (scores, _seconds) in zip(prefixes, scored, strict=True):
            found[tuple(token_ids)] = scores.clone()
        return scored

    def forward(segments):
        passes.append(len(segments))
        return original_forward(segments)

    runtime._reconstruction.run = run
    runtime._reconstruction._forward = forward
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
    torch.save({"scores": found, "passes": passes}, sys.argv[2])


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
