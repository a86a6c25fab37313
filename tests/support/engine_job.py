"""Run one vLLM engine in a process of its own and report what it did.

A test describes a job, :func:`run_job` starts this file as a program, and the answer comes back as
JSON. Inside, the engine runs in-process and is stepped by hand, so that the block pool can be read
after every step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults import broken_embeddings, inject_faults
from forked_script import ENGINES, run_script

MODEL = Path(__file__).parent.parent / "models" / "tiny-retriever"
MAX_SECONDS = 300
TWO_STAGES = {
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "enforce_eager": False,  # vLLM's stages need some compilation on the CPU: this is the least
    "compilation_config": {"mode": 2, "backend": "eager"},
}
"""Arguments of ``LLM`` for two pipeline stages."""
RUNNER_V2 = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parent / "triton_cpu"), os.environ.get("PYTHONPATH")])
    ),
}
"""Environment in which vLLM's model runner V2 runs on a CPU."""


@dataclass
class Request:
    """One request of a job.

    Attributes:
        prompt: token ids.
        max_tokens: output length; the end-of-sequence token is ignored unless ``options`` differ.
        arrives: step before which it is added.
        aborts: step before which it is aborted, or None.
        aborts_during: step while whose forward pass the abort arrives, or None.
        options: more fields of ``SamplingParams``; ``structured_outputs`` as a dict.
        cache_salt: keeps its cache entries apart, or None.
        lora: folder of a LoRA adapter, or None.
        fault: what goes wrong when it is compressed, one of ``faults.FAULTS``, or None.
        embeds: the prompt is sent as embeddings, all the same number but for one token's, which
            are this; how many tells the prompt. None sends the tokens.
    """

    prompt: list[int]
    max_tokens: int = 16
    arrives: int = 0
    aborts: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None
    aborts_during: int | None = None
    lora: str | None = None
    fault: str | None = None
    embeds: float | None = None


@dataclass
class Report:
    """What the engine did.

    Attributes:
        outputs: token ids by request number; aborted ones have what came before.
        free_blocks: free blocks of the pool before the first step and after each step.
        held_blocks: after each step, blocks in the row of each request by number, null excluded.
        metrics: the plugin's metrics at the end, by sample name.
        prefix_entries: compressed prefixes in the prefix cache after each step.
        idle_prefixes: after each action ``sleep``, how many of them there are, and are listed.
        num_preemptions: how many times a request was preempted.
        classes: names of the classes vLLM used: backend, spec, manager, scheduler, worker; the
            runner's module, since both versions have the same name.
        cached_tokens: prompt tokens found in the prefix cache, by request.
        logprobs: sampled token's log-probability by request, when asked for.
        samples: token ids by request and sample.
        finish_reasons: by request, of its first sample.
        texts: by request, of its first sample.
        prompt_logprobs: of the prompt's tokens from the second on, by request, when asked for.
        computed_tokens: tokens computed after each step of each unfinished request, by number.
        output_tokens: the same of tokens that it has generated.
        preemptions_seen: requests that were seen preempted, by number, and how often.
        written_hashed_blocks: blocks of the prefix cache that somebody wrote to; when watched.
        compared_hashed_blocks: how many comparisons that rests on, raw and compressed.
        batches_in_flight: how many steps may be scheduled before the first has been processed.
        scribbled_blocks: blocks that the action ``scribble`` wrote to.
        pages_per_head: head pages of a KV head in a block; 0 without compression.
        told: by request, what the plugin told its client; None where it told nothing.
        listed_prefixes: compressed prefixes in the cache at the end, as the endpoint lists them.
    """

    outputs: list[list[int]]
    free_blocks: list[int]
    held_blocks: list[dict[str, int]]
    metrics: dict[str, float]
    prefix_entries: list[int]
    idle_prefixes: list[list[int]]
    num_preemptions: int
    classes: dict[str, str]
    cached_tokens: list[int]
    logprobs: list[list[float]]
    samples: list[list[list[int]]]
    finish_reasons: list[str | None]
    texts: list[str]
    prompt_logprobs: list[list[float]]
    computed_tokens: list[dict[str, int]]
    output_tokens: list[dict[str, int]]
    preemptions_seen: dict[str, int]
    written_hashed_blocks: list[int]
    compared_hashed_blocks: dict[str, int]
    scribbled_blocks: list[int]
    batches_in_flight: int
    pages_per_head: int
    told: list[dict[str, Any] | None]
    listed_prefixes: list[dict[str, Any]]


def run_job(
    requests: list[Request],
    kvzip: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    model: Path = MODEL,
    actions: dict[int, str] | None = None,
    watch_hashed_blocks: bool = False,
    asynchronous: bool = False,
    triton_attention: bool = False,
    gpu_path: bool = False,
    offloaded_to: Path | None = None,
    **engine: Any,
) -> Report:
    """Run requests through a fresh engine.

    Args:
        requests: what to send.
        kvzip: settings of the plugin; None leaves compression off.
        environment: more environment variables.
        model: folder of the model.
        actions: step before which something is done: ``reset`` the prefix cache, ``sleep`` for
            half a second, or ``scribble`` over a block that is being watched.
        watch_hashed_blocks: see :class:`hashed_blocks.HashedBlockWatch`.
        asynchronous: see :mod:`forced_async`.
        triton_attention: attend over head pages by our own kernel, interpreted.
        gpu_path: see :mod:`gpu_path`; needs :data:`RUNNER_V2`.
        offloaded_to: file that gets what :mod:`plain_offload` keeps at the end.
        engine: more arguments of ``LLM``.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "block_size": 32,
        **engine,
    }
    if kvzip is not None:
        arguments["additional_config"] = {"kvzip": kvzip}
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        job.write_text(
            json.dumps(
                {
                    "engine": arguments,
                    "requests": [asdict(request) for request in requests],
                    "actions": actions or {},
                    "watch_hashed_blocks": watch_hashed_blocks,
                    "asynchronous": asynchronous,
                    "triton_attention": triton_attention,
                    "gpu_path": gpu_path,
                    "offloaded_to": str(offloaded_to) if offloaded_to else None,
                }
            )
        )
        done = run_script(
            Path(__file__),
            str(job),
            str(answer),
            environment={
                **ENGINES,
                "TMPDIR": folder,  # the process ends without cleaning up
                **(environment or {}),
            },
            timeout=MAX_SECONDS,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"engine failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            )
        return Report(**json.loads(answer.read_text()))


def execute(job: dict[str, Any]) -> Report:
    """The other side: run the job in this process."""
    sys.path.append(str(Path(__file__).parent.parent.parent / "scripts"))
    from forced_async import force_async_scheduling
    from prometheus_client import REGISTRY
    from vllm import LLM

    from soaking.hashed_blocks import HashedBlockWatch

    if job["asynchronous"]:
        force_async_scheduling()
    if job["gpu_path"]:
        from gpu_path import take_gpu_path

        take_gpu_path()
    if job["triton_attention"]:
        from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
        from vllm_kvzip.vllm_bridge.worker.cpu_worker import HeadPageCPUWorker

        HeadPageCPUWorker.attach = lambda worker, cache, builders: KernelBatcher(
            cache, worker.scheduler_config.max_num_seqs
        )
    llm = LLM(**job["engine"])
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_manager
    managers = cache.coordinator.single_type_managers
    manager = next((one for one in managers if hasattr(one, "prefixes")), managers[0])
    requests = [Request(**values) for values in job["requests"]]
    if faults := {str(n): request.fault for n, request in enumerate(requests) if request.fault}:
        core.model_executor.collective_rpc(inject_faults, args=(faults,))
    samples: list[dict[int, list[int]]] = [{} for _ in requests]
    finish_reasons: list[str | None] = [None] * len(requests)
    told: list[dict[str, Any] | None] = [None] * len(requests)
    texts = [""] * len(requests)
    prompt_logprobs: list[list[float]] = [[] for _ in requests]
    watch = HashedBlockWatch(core) if job["watch_hashed_blocks"] else None
    scribbled = []
    computed: list[dict[str, int]] = []
    generated: list[dict[str, int]] = []
    preempted: dict[str, int] = {}
    logprobs: list[list[float]] = [[] for _ in requests]
    free, held = [cache.block_pool.get_num_free_blocks()], []
    cached_tokens = [0] * len(requests)
    entries: list[int] = []
    idle: list[list[int]] = []
    step = preemptions = 0
    open_requests = set(range(len(requests)))
    while open_requests:
        action = job["actions"].get(str(step))
        if action == "reset":
            assert llm.reset_prefix_cache()
        elif action == "sleep":
            time.sleep(0.5)
            (cached,) = llm.collective_rpc("kvzip_contexts")
            idle.append([len(manager.prefixes), len(cached)])
        elif action == "scribble":
            scribbled.append(watch.scribble())
        for number, request in enumerate(requests):
            if request.arrives == step:
                prompt = {"prompt_token_ids": request.prompt}
                if request.embeds is not None:
                    prompt = {"prompt_embeds": broken_embeddings(request, llm)}
                if request.cache_salt:
                    prompt["cache_salt"] = request.cache_salt
                lora = adapter(request.lora, requests) if request.lora else None
                engine.add_request(str(number), prompt, sampling(request), lora_request=lora)
            if request.aborts == step:
                engine.abort_request([str(number)])
                open_requests.discard(number)
            if request.aborts_during == step:
                ended = engine.output_processor.abort_requests([str(number)], internal=False)
                core.aborts_queue.put(ended)
                open_requests.discard(number)
        for output in engine.step():
            number = int(output.request_id)
            cached_tokens[number] = output.num_cached_tokens or 0
            for sample in output.outputs:
                samples[number][sample.index] = list(sample.token_ids)
                if sample.index == 0:
                    texts[number], finish_reasons[number] = sample.text, sample.finish_reason
                    told[number] = (output.kv_transfer_params or {}).get("kvzip")
                    if sample.logprobs:
                        logprobs[number] = of_tokens(sample.logprobs, sample.token_ids)
            if output.prompt_logprobs:
                prompt_logprobs[number] = of_tokens(
                    output.prompt_logprobs[1:], requests[number].prompt[1:]
                )
            if output.finished:
                open_requests.discard(number)
        if watch:
            watch.after_step()
        free.append(cache.block_pool.get_num_free_blocks())
        rows = manager.req_to_blocks
        entries.append(len(getattr(manager, "prefixes", ())))
        held.append({name(rid): sum(not b.is_null for b in row) for rid, row in rows.items()})
        running = core.scheduler.requests.values()
        computed.append({name(r.request_id): r.num_computed_tokens for r in running})
        generated.append({name(r.request_id): r.num_output_tokens for r in running})
        preemptions = max(preemptions, sum(r.num_preemptions for r in running))
        preempted |= {name(r.request_id): r.num_preemptions for r in running if r.num_preemptions}
        step += 1
    for _ in range(3):
        engine.step()
    free.append(cache.block_pool.get_num_free_blocks())
    if job["offloaded_to"]:
        from plain_offload import dump

        dump(job["offloaded_to"])
    classes = {
        "spec": type(manager.kv_cache_spec).__name__,
        "manager": type(manager).__name__,
        "scheduler": type(core.scheduler).__name__,
    }
    if driver := getattr(core.model_executor, "driver_worker", None):  # else in other processes
        classes["worker"] = type(driver.worker).__name__
        runner = driver.worker.model_runner
        classes["backend"] = runner.attn_groups[manager.kv_cache_group_id][0].backend.__name__
        classes["runner"] = type(runner).__module__
        if runtime := getattr(driver.worker, "_kvzip", None):
            classes["batcher"] = type(runtime._batcher).__name__
    listed = llm.collective_rpc("kvzip_contexts")[0] if hasattr(manager, "prefixes") else []
    metrics = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("vllm_kvzip"):
                label = next((v for k, v in sample.labels.items() if k != "le"), None)
                if "le" not in sample.labels:
                    metrics[sample.name + (f"/{label}" if label else "")] = sample.value
    return Report(
        outputs=[found.get(0, []) for found in samples],
        free_blocks=free,
        held_blocks=held,
        metrics=metrics,
        prefix_entries=entries,
        idle_prefixes=idle,
        num_preemptions=preemptions,
        classes=classes,
        cached_tokens=cached_tokens,
        logprobs=logprobs,
        samples=[[found[index] for index in sorted(found)] for found in samples],
        finish_reasons=finish_reasons,
        told=told,
        listed_prefixes=listed,
        texts=texts,
        prompt_logprobs=prompt_logprobs,
        computed_tokens=computed,
        output_tokens=generated,
        preemptions_seen=preempted,
        written_hashed_blocks=watch.written if watch else [],
        compared_hashed_blocks=watch.compared if watch else {},
        scribbled_blocks=scribbled,
        batches_in_flight=core.batch_queue_size,
        pages_per_head=rule.pages_per_head if (rule := getattr(manager, "rule", None)) else 0,
    )


def sampling(request: Request) -> Any:
    """vLLM's parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = {
        "temperature": 0,
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
        **request.options,
    }
    if constraint := fields.get("structured_outputs"):
        fields["structured_outputs"] = StructuredOutputsParams(**constraint)
    return SamplingParams(**fields)


def adapter(folder: str, requests: list[Request]) -> Any:
    """vLLM's request for an adapter; adapters are numbered in the order of their folders."""
    from vllm.lora.request import LoRARequest

    folders = sorted({request.lora for request in requests if request.lora})
    return LoRARequest(Path(folder).name, folders.index(folder) + 1, folder)


def name(internal_id: str) -> str:
    """The number a request was sent under; samples of one request are told apart by ``0_``."""
    return internal_id.split("-")[0]


def of_tokens(positions: Any, tokens: Any) -> list[float]:
    """The log-probability of each token in what vLLM says of its position."""
    return [position[token].logprob for position, token in zip(positions, tokens, strict=True)]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(
        json.dumps(asdict(execute(json.loads(Path(sys.argv[1]).read_text()))))
    )
    sys.stdout.flush()
    os._exit(0)  # vLLM's own shutdown is not what is tested, and costs seconds
