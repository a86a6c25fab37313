"""Lead requests of a vLLM engine through given tokens: a logits processor that applies lessons.

The engine must run in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``, one rank), because the
records stay here. vLLM's ``prompt_logprobs`` would not do: a request that asks for them reads no
cached prefix. Its ``logprobs`` compile a kernel on first use and give no whole distribution.

The first token of a request comes from its prefill. It counts like the others where the request
starts from a compressed prefix, because its question is then read over that prefix.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.symbols import LogitsProcessor, process_dict_updates

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.evaluation.quality.lessons import Lesson
    from vllm_kvzip.vllm_bridge.symbols import BatchUpdate, SamplingParams, VllmConfig

LESSON = "lesson"  # key in ``extra_args``

_lessons: dict[int, Lesson] = {}  # by number: vLLM copies what ``extra_args`` hold
_numbers = count()


def give(lesson: Lesson) -> dict[str, int]:
    """What a request's ``extra_args`` must hold to follow a lesson; see :func:`forget`."""
    number = next(_numbers)
    _lessons[number] = lesson
    return {LESSON: number}


def forget() -> None:
    """Drop all lessons, when no request follows any."""
    _lessons.clear()


class TeacherForcing(LogitsProcessor):
    """Applies each request's lesson; other requests are left alone."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[Lesson, list[int]]] = {}  # with the tokens generated so far

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (lesson, generated) in self._rows.items():
            lesson.follow(logits[row], len(generated))
        return logits


def _state(
    params: SamplingParams, _prompt: list[int] | None, generated: list[int]
) -> tuple[Lesson, list[int]] | None:
    number = (params.extra_args or {}).get(LESSON)
    return None if number is None else (_lessons[number], generated)
