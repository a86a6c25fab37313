"""The GPU's worker on a machine without one: its attention backend, kernels and bookkeeping.

Runner V2 and all Triton kernels run in Triton's interpreter, vLLM's own ones too. What is missing
is the card: FlashAttention, CUDA graphs and streams. For tests only.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from gpu_engine import use_other_scales
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.ops import triton_reshape_and_cache_flash
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvzip.clocks import HostClock
from vllm_kvzip.vllm_bridge import platforms
from vllm_kvzip.vllm_bridge.attention.gpu_attention import HeadPageTritonBackend
from vllm_kvzip.vllm_bridge.start import checks, options
from vllm_kvzip.vllm_bridge.worker import gpu_worker
from vllm_kvzip.vllm_bridge.worker.gpu_worker import TritonPath


class GPUPathWorker(TritonPath, CPUWorker):
    backends: ClassVar = {AttentionBackendEnum.CPU_ATTN: HeadPageTritonBackend}
    clock = HostClock()


def take_gpu_path():
    """Engines made from now on take it."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM's cache kernel asks
    worker_class = f"{__name__}.{GPUPathWorker.__qualname__}"
    platforms.CPU = replace(
        platforms.CPU, worker_class=worker_class, pages_per_head=platforms.GPU.pages_per_head
    )
    options.check_attention_kernel = lambda *choice: None
    checks._cpu_problems = lambda config: []  # cards can have caches of 8-bit numbers
    use_other_scales()
    triton_reshape_and_cache_flash._is_supported_kv_cache_dtype = lambda name: True
    gpu_worker.REQUESTS, gpu_worker.CONTEXT_TOKENS = 2, 96  # the interpreter is slow
