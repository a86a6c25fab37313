"""What the scheduler tells the workers of a step beyond vLLM's own message."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import SchedulerOutput

_ATTRIBUTE = "kvzip_prefixes"


@dataclass(frozen=True)
class StepPrefixes:
    """Compressed prefixes of one step; runs go by their serial number.

    Attributes:
        kept: request that crosses in this step -> the run it leaves in the prefix cache.
        hits: request that starts from a compressed prefix in this step -> that run.
        dropped: runs that left the prefix cache.
        reserved: request that crosses in this step -> its run, kept or not.
        left_alone: requests whose compression failed; nothing of them is compressed any more.
        repeats: request -> how many chunks of its context the model repeats before this step.
        seeds: kept request that was compressed before -> the seed of all tokens of its prefix.
    """

    kept: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    reserved: dict[str, int] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


_NOTHING = StepPrefixes()


def attach(output: SchedulerOutput, prefixes: StepPrefixes | None) -> None:
    """Let a message travel with vLLM's own to the workers."""
    if prefixes is not None:
        setattr(output, _ATTRIBUTE, prefixes)


def attached(output: SchedulerOutput) -> StepPrefixes:
    """The message of :func:`attach`, on the workers' side; an empty one when there was none."""
    message: StepPrefixes = getattr(output, _ATTRIBUTE, _NOTHING)
    return message
