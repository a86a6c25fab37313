"""What became of each compression: from the workers to the scheduler, with a step's output.

The scheduler folds a row before anybody can know whether its prompt could be compressed, so that
blocks are free in time. Where it could not, the scheduler learns it with the output of the same
step, takes that output back, and lets the request start again, uncompressed. On a GPU nobody waits
for that: whether all numbers were finite is a tensor of its own, copied behind the compression and
read when the step's tokens are. The scheduler gets the output of the last pipeline stage, so the
stages before it hand their outcomes on.

How many blocks a compression needs is told in the same way, where a quality loss decides. Ranks
have other KV heads, so each needs its own number; the most of them count.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.vllm_bridge.parallelism import add_up_over_stages
from vllm_kvzip.vllm_bridge.symbols import (
    AsyncModelRunnerOutput,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    init_logger,
    tensor_model_parallel_all_reduce,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vllm_kvzip.vllm_bridge.symbols import ModelRunnerOutput

logger = init_logger("vllm." + __name__)

_ATTRIBUTE = "kvzip_outcomes"
NOT_FINITE, FAILED = FAILURES
_CODES: dict[str | None, float] = {None: 0.0, NOT_FINITE: 1.0, FAILED: 2.0**16}
"""Added up over ranks: any sum from the code of a failure on is one."""

Fit = tuple[int, float]
"""Blocks that a compression needs, and nats a token that it is estimated to cost."""

Outcome = str | Fit | None
"""One of ``metrics.FAILURES``, or None: compressed, or not wanted any more. A fit: compressed."""


class WorkerOutcomes:
    """Outcomes of one worker's compressions, agreed upon by all ranks, step by step.

    Args:
        device: of the worker.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ordered: tuple[int, ...] = ()
        self._of_step: dict[int, str | torch.Tensor | None] = {}
        self._fits: dict[int, Fit] = {}
        self._read: Callable[[], dict[int, Outcome]] | None = None

    def order(self, serials: Iterable[int]) -> None:
        """Compressions that the scheduler ordered with a step; they are settled in the next one.

        Ranks take the order from the scheduler's message, which is the same for all of them. What
        one of them has tried may differ: after a failure it knows nothing more of that request.

        Args:
            serials: of their runs.
        """
        self._ordered = tuple(serials)

    def add(self, serial: int, outcome: str | torch.Tensor | None, fit: Fit | None = None) -> None:
        """Note what became of a compression.

        Args:
            serial: of its run.
            outcome: one of ``metrics.FAILURES``, None, or a bool tensor of one element, whether all
                its numbers are finite.
            fit: where a quality loss decides.
        """
        self._of_step[serial] = outcome
        if fit is not None:
            self._fits[serial] = fit

    def settle(self) -> None:
        """All compressions of a step have been tried: agree with the other ranks.

        Every rank settles the same compressions in the same step, in the same order. What one of
        them could not compress, all leave alone.
        """
        found, self._of_step = self._of_step, {}
        fits, self._fits = self._fits, {}
        ordered, self._ordered = self._ordered, ()
        if not ordered:
            return
        own = [found.get(serial, FAILED) for serial in ordered]
        num_ranks = get_tensor_model_parallel_world_size()
        figures = _as_figures(own, list(map(fits.get, ordered)), num_ranks, self._device)
        if num_ranks > 1:
            figures = tensor_model_parallel_all_reduce(figures)
        of_all = add_up_over_stages(figures)
        if of_all is None:  # the last stage tells the scheduler
            return
        read = _read_later(of_all)
        self._read = lambda: dict(zip(ordered, map(_as_outcome, read()), strict=True))

    def attach(
        self, output: ModelRunnerOutput | AsyncModelRunnerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Let the outcomes of the step travel with its output to the scheduler."""
        read, self._read = self._read, None
        if read is None:
            return output
        telling = _Telling(output, read)
        is_known = self._device.type == "cpu" and not isinstance(output, AsyncModelRunnerOutput)
        return telling.get_output() if is_known else telling


class _Telling(AsyncModelRunnerOutput):
    """Output of a step with outcomes, which are read when the output is."""

    def __init__(
        self,
        output: ModelRunnerOutput | AsyncModelRunnerOutput,
        read: Callable[[], dict[int, Outcome]],
    ) -> None:
        self._output = output
        self._read = read

    def get_output(self) -> ModelRunnerOutput:
        """The step's output once its tokens and outcomes are there; waits for both."""
        output = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        output = copy(output)  # that of an empty step is shared
        setattr(output, _ATTRIBUTE, self._read())
        return output


def told(output: ModelRunnerOutput) -> Mapping[int, Outcome]:
    """What :meth:`WorkerOutcomes.attach` attached, on the scheduler's side."""
    outcomes: Mapping[int, Outcome] = getattr(output, _ATTRIBUTE, {})
    return outcomes


def log_failure(request_id: str, error: Exception) -> None:
    """One line; a traceback would keep alive what was in memory."""
    logger.error(
        "Request %s could not be compressed and goes on uncompressed: %s: %s",
        request_id,
        type(error).__name__,
        " ".join(str(error).split()),
    )


def _as_figures(
    outcomes: list[str | torch.Tensor | None],
    fits: list[Fit | None],
    num_ranks: int,
    device: torch.device,
) -> torch.Tensor:
    """Float32 ``[n, 1 + 2 * ranks]``, a row an outcome.

    Its code, the blocks that each rank needs, and the losses that they estimate. Each rank fills
    its own two columns, so that adding them up over the ranks gathers them. Numbers are written one
    by one: a copy from the host would wait for the device.
    """
    figures = torch.zeros(len(outcomes), 1 + 2 * num_ranks, dtype=torch.float32, device=device)
    for row, outcome, fit in zip(figures, outcomes, fits, strict=True):
        if isinstance(outcome, torch.Tensor):
            row[0] = torch.where(outcome, 0.0, _CODES[NOT_FINITE])
        else:
            row[0] = _CODES[outcome]
        if fit is not None:
            own = 1 + get_tensor_model_parallel_rank()
            row[own], row[own + num_ranks] = fit
    return figures


def _as_outcome(figures: list[float]) -> Outcome:
    code, *of_ranks = figures
    if code >= _CODES[FAILED]:
        return FAILED
    if code >= _CODES[NOT_FINITE]:
        return NOT_FINITE
    blocks, losses = of_ranks[: len(of_ranks) // 2], of_ranks[len(of_ranks) // 2 :]
    return (int(max(blocks)), sum(losses) / len(losses)) if max(blocks) else None


def _read_later(codes: torch.Tensor) -> Callable[[], list[list[float]]]:
    """Copy numbers off their device behind all work before; reading waits for just that."""
    if codes.device.type == "cpu":
        return codes.tolist
    host = torch.empty(codes.shape, pin_memory=True)
    host.copy_(codes, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record()

    def read() -> list[list[float]]:
        copied.synchronize()
        return host.tolist()

    return read
