"""Compress contexts in an engine of its own, answer about them, and export them: a program.

Its job and its answer are JSON files; see :func:`export_contexts`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from engine_job import MODEL
from forked_script import ENGINES, run_script


def export_contexts(
    folder: Path, settings: dict[str, Any], contexts: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What an engine says of its contexts, by the names of their files.

    Args:
        folder: ``contexts_dir``; takes the files of the job too, in its parent.
        settings: of the plugin.
        contexts: name -> ``tokens``, ``prompts`` that are asked over it, ``keep_ratio`` or None.

    Returns:
        name -> what the export told, ``texts``, the answers of 16 tokens, and what is
        ``explained`` of the context.
    """
    job, answer = folder.parent / "job.json", folder.parent / "answer.json"
    values = {"settings": {**settings, "contexts_dir": str(folder)}, "contexts": contexts}
    job.write_text(json.dumps(values))
    environment = {**ENGINES, "TMPDIR": str(folder.parent)}
    done = run_script(Path(__file__), str(job), str(answer), environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(answer.read_text())
    return found


def execute(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Inside of the process: see :func:`export_contexts`."""
    from vllm import LLM, SamplingParams

    from vllm_kvzip.vllm_bridge.contexts.calls import export_context
    from vllm_kvzip.vllm_bridge.contexts.explain import explain_context

    llm = LLM(
        model=str(MODEL), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        block_size=32, additional_config={"kvzip": job["settings"]},
    )  # fmt: skip
    found = {}
    for name, context in job["contexts"].items():
        options = {"kvzip_context_tokens": len(context["tokens"])}
        if context["keep_ratio"] is not None:
            options["kvzip_keep_ratio"] = context["keep_ratio"]

        def generate(prompts: list[list[int]], count: int, options: Any = options) -> list[str]:
            params = SamplingParams(
                max_tokens=count, temperature=0, ignore_eos=True, extra_args=options
            )
            tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(tokens, params, use_tqdm=False)
            return [output.outputs[0].text for output in outputs]

        before = {listed["id"] for listed in llm.collective_rpc("kvzip_contexts")[0]}
        generate([context["tokens"]], 3)
        (new,) = (
            listed["id"]
            for listed in llm.collective_rpc("kvzip_contexts")[0]
            if listed["id"] not in before
        )
        told = export_context(llm, new, name, context["keep_ratio"])
        explained = explain_context(llm, context["tokens"], context["keep_ratio"])
        found[name] = {
            **told, "texts": generate(context["prompts"], 16), "explained": explained
        }  # fmt: skip
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(execute(json.loads(Path(sys.argv[1]).read_text()))))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own shutdown is not what is tested, and costs seconds
