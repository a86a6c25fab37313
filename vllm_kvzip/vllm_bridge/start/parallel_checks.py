"""Which ways of sharing a model between processes cannot be combined with KV compression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.fingerprint import rows_of_stages
from vllm_kvzip.vllm_bridge.parallelism import can_share
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.symbols import CompilationMode, envs

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def parallel_problems(vllm_config: VllmConfig, is_mixed: bool) -> list[tuple[bool, str]]:
    """Whether something is refused, and its name with what to do.

    Args:
        vllm_config: of the engine.
        is_mixed: whether some layers are compressed and others are left alone.
    """
    parallel = vllm_config.parallel_config
    num_kv_heads = vllm_config.model_config.get_total_num_kv_heads()
    contexts = {
        "--decode-context-parallel-size": parallel.decode_context_parallel_size,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size,
    }
    problems = [(size > 1, f"{flag} {size} yet; set it to 1") for flag, size in contexts.items()]
    problems += [
        (
            not can_share(parallel.tensor_parallel_size, num_kv_heads),
            f"--tensor-parallel-size {parallel.tensor_parallel_size} for {num_kv_heads} KV heads; "
            f"choose a divisor or a multiple of {num_kv_heads}",
        ),
        (
            parallel.distributed_executor_backend == "ray"
            and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND,
            "vLLM's old Ray executor, which passes workers by; unset "
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        ),
    ]
    if parallel.pipeline_parallel_size > 1:
        problems += _stage_problems(vllm_config, is_mixed)
    return problems


def _stage_problems(vllm_config: VllmConfig, is_mixed: bool) -> list[tuple[bool, str]]:
    """The same of pipeline stages."""
    flag = f"--pipeline-parallel-size {vllm_config.parallel_config.pipeline_parallel_size}"
    return [
        (is_mixed, f"{flag} for models whose layers differ yet; set it to 1"),
        (
            not all(rows.start < rows.stop for rows in rows_of_stages(vllm_config)),
            f"{flag} where a stage has no layer to compress; set it lower",
        ),
        (
            vllm_config.speculative_config is not None,
            f"speculative decoding with {flag} yet; remove one of them",
        ),
        (
            running_platform().name == "cpu"
            and not vllm_config.use_v2_model_runner
            and vllm_config.compilation_config.mode == CompilationMode.NONE,
            f"{flag} with --enforce-eager on the CPU, where vLLM itself fails; remove "
            f"--enforce-eager",
        ),
    ]
