"""Worker side: what may fail while a prompt is compressed concerns that prompt alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.vllm_bridge.requests import TrackedRequest
    from vllm_kvzip.vllm_bridge.scoring_pass import ReconstructionPass

logger = init_logger("vllm." + __name__)


@dataclass(frozen=True)
class Repeated:
    """What the model paid attention to while it repeated a prefix.

    Attributes:
        scores: float32 ``[L, H, T]``.
        begin, end: marks of the clock around the passes.
        share: of the work between them.
    """

    scores: torch.Tensor
    begin: Any
    end: Any
    share: float


def repeat_prefixes(
    reconstruction: ReconstructionPass,
    requests: Sequence[TrackedRequest],
    clock: Clock,
    num_ranks: int,
) -> list[Repeated | None]:
    """Let the model repeat prefixes, one by one where all together fail.

    Args:
        reconstruction: runs the model.
        requests: whose prefixes are complete.
        clock: measures the passes.
        num_ranks: of tensor parallelism. With several of them an error goes on upwards and ends
            the engine, as one in vLLM's own step does: the other ranks may be waiting for this one
            inside the model, where nothing can be agreed upon.

    Returns:
        one each; None for a prefix that fails alone as well.
    """
    if not requests:
        return []
    prefixes = []
    for request in requests:
        assert request.plan is not None
        blocks = request.block_ids[: request.plan.num_prefix_blocks]
        prefixes.append((request.token_ids, blocks))
    begin = clock.mark()
    try:
        scored = reconstruction.run(prefixes)
    except Exception as error:
        if num_ranks > 1:
            raise
        if len(requests) == 1:
            log_failure(requests[0].request_id, error)
            return [None]
    else:
        end = clock.mark()
        return [Repeated(scores, begin, end, share) for scores, share in scored]
    singly = [repeat_prefixes(reconstruction, [r], clock, num_ranks) for r in requests]
    return [repeated for (repeated,) in singly]


def log_failure(request_id: str, error: Exception) -> None:
    """One line; a traceback would keep alive what was in memory."""
    logger.error(
        "Request %s could not be compressed and goes on uncompressed: %s: %s",
        request_id,
        type(error).__name__,
        " ".join(str(error).split()),
    )
