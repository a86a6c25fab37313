"""What an engine runs on: CPUs or NVIDIA GPUs, and what follows for its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_kvzip.vllm_bridge import symbols
from vllm_kvzip.vllm_bridge.symbols import current_platform

if TYPE_CHECKING:
    from collections.abc import Callable

_CPU_BLOCK_UNIT = 32
_GPU_BLOCK_SIZES = (16, 32, 64, 128)
_GPU_PAGE_TOKENS = 16  # of a head page in the larger blocks of models with states; divides them


@dataclass(frozen=True)
class ServedPlatform:
    """A kind of device that compression runs on.

    Attributes:
        name: which of them.
        where: the same in a sentence.
        worker_class: our worker, as vLLM wants it named.
        default_block_size: tokens per block when the user names none.
        takes_block_size: whether a block size that the user names works.
        block_sizes: those that do, in words.
        pages_per_head: head pages of one KV head of a layer in a block of so many tokens, which
            vLLM may have made larger than the user named.
        attention_backends: vLLM's names of those that a user can choose; none where there is only
            one.
        has_kernel_choice: whether setting ``attention_kernel`` means anything.
        symbols: vLLM's names that its workers need beyond the common ones.
    """

    name: Literal["cpu", "gpu"]
    where: str
    worker_class: str
    default_block_size: int
    takes_block_size: Callable[[int], bool]
    block_sizes: str
    pages_per_head: Callable[[int], int]
    attention_backends: tuple[str, ...]
    has_kernel_choice: bool
    symbols: dict[str, str]


def _gpu_pages_per_head(block_size: int) -> int:
    return 1 if block_size in _GPU_BLOCK_SIZES else block_size // _GPU_PAGE_TOKENS


CPU = ServedPlatform(
    name="cpu",
    where="on the CPU",
    worker_class="vllm_kvzip.vllm_bridge.worker.cpu_worker.HeadPageCPUWorker",
    default_block_size=_CPU_BLOCK_UNIT,
    takes_block_size=lambda size: size % _CPU_BLOCK_UNIT == 0,
    block_sizes=f"a multiple of {_CPU_BLOCK_UNIT}",
    pages_per_head=lambda size: 1,  # the kernel packs the elements of a block as a whole
    attention_backends=(),
    has_kernel_choice=False,
    symbols=symbols.CPU,
)
GPU = ServedPlatform(
    name="gpu",
    where="on GPUs",
    worker_class="vllm_kvzip.vllm_bridge.worker.gpu_worker.HeadPageGPUWorker",
    default_block_size=_GPU_BLOCK_SIZES[0],
    takes_block_size=lambda size: size in _GPU_BLOCK_SIZES,
    block_sizes=f"one of {', '.join(map(str, _GPU_BLOCK_SIZES))}",
    pages_per_head=_gpu_pages_per_head,
    attention_backends=("FLASH_ATTN", "TRITON_ATTN"),
    has_kernel_choice=True,
    symbols=symbols.GPU,
)


def running_platform() -> ServedPlatform:
    """The platform of this process; of devices that are not served (see below), the GPU's."""
    return CPU if current_platform.is_cpu() else GPU


def unserved_device() -> str | None:
    """Name of this process's device when compression does not run on it, else None."""
    if current_platform.is_cpu() or current_platform.is_cuda():
        return None
    return str(current_platform.device_name)
