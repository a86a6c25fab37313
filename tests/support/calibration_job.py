"""Let the model of a real engine read contexts and repeat them, as it does for a head profile.

    python calibration_job.py JOB ANSWER

JOB is JSON: engine arguments, contexts, and how many tokens are repeated at once; ANSWER a file of
`torch.save` with the scores ``[L, H, T]`` of each context.
"""

import json
import os
import sys
from pathlib import Path


def main():
    import torch
    from vllm import LLM

    from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
    from vllm_kvzip.vllm_bridge.passes import profile_build

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**job["engine"])
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    tokenizer = llm.get_tokenizer()
    watch, _ = profile_build._calibration_pass(
        worker.vllm_config,
        worker.model_runner.get_model(),
        worker.score_columns,
        worker.kvzip_settings.config,
        repeat_wording("repeat", None, tokenizer),
        tokenizer,
    )
    with torch.no_grad():
        torch.save([watch.score(context) for context in job["contexts"]], sys.argv[2])


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
