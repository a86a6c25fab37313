"""What attention needs to know of a step's batch, whichever kernel serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from vllm_kvzip.core import CompressedPrefix, PrefixPlan
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata


@dataclass(frozen=True)
class QuerySpan:
    """Rows of the batch whose queries a scorer wants: ``query[start:end]`` of ``request_id``.

    ``position`` is that of the first of them in the request.
    """

    request_id: str
    start: int
    end: int
    position: int = 0


@dataclass(frozen=True, eq=False)
class PrefixState:
    """The compressed prefix of one request, as attention needs it.

    Compared by identity: requests that share a prefix have a state each, because a page table also
    holds their dense tails.
    """

    prefix: CompressedPrefix
    plan: PrefixPlan


class AttendingBatch(Protocol):
    """Requests of a step, ready for a kernel."""

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer; rows of requests that are not among them are left alone."""
        ...


@dataclass(frozen=True)
class SplitBatch:
    """A batch in two parts.

    Attributes:
        compressed: the compressed requests; other requests can be among them.
        dense_rows: rows of all others, int64, or a slice up to the end; None when there are none.
        dense_tokens: rows of their tokens, likewise.
    """

    compressed: AttendingBatch
    dense_rows: torch.Tensor | slice | None
    dense_tokens: torch.Tensor | slice | None


class Batcher(Protocol):
    """Describes the batch of a step to a kernel."""

    def split(
        self,
        request_ids: list[str],
        common: CommonAttentionMetadata,
        states: Mapping[str, PrefixState],
    ) -> SplitBatch | None:
        """The batch in two parts; None when nobody is compressed.

        Args:
            request_ids: in row order.
            common: vLLM's metadata of the batch.
            states: compressed requests.
        """
        ...


@dataclass(frozen=True)
class StepDescription:
    """What attention must do in one step beyond vLLM's own path.

    Attributes:
        split: compressed and other requests; None when nobody is compressed.
        spans: queries to hand to the scorer.
    """

    split: SplitBatch | None
    spans: tuple[QuerySpan, ...]


class StepDescriber(Protocol):
    """Knows which requests of a batch are compressed, and whose queries a scorer wants.

    Attributes:
        has_work: whether any request of this step may need more than vLLM's own path.
    """

    @property
    def has_work(self) -> bool:
        """See above."""
        ...

    def describe_step(self, common: CommonAttentionMetadata) -> StepDescription | None:
        """Split the batch into compressed and other requests; None when vLLM's path serves all.

        Args:
            common: vLLM's metadata of the batch.
        """
        ...

    def observe(
        self, layer: Any, query: torch.Tensor, spans: tuple[QuerySpan, ...], dtype: torch.dtype
    ) -> None:
        """Keep the queries of one layer for the scorer.

        Args:
            layer: vLLM's.
            query: ``[num_tokens, H * G, D]`` of the whole batch.
            spans: rows that are kept.
            dtype: of the model.
        """
        ...


_WORK = "kvzip_work"  # attribute of vLLM's metadata


@dataclass(frozen=True)
class HeadPageWork:
    """What each layer does in one step beyond vLLM's own path; attached to vLLM's metadata.

    Attributes:
        observer: gets the queries of ``spans``.
        spans: queries to hand to the scorer.
        compressed: requests that are served over head pages; None when vLLM's kernel serves all.
        num_tokens: rows of tokens, from the first on, among which those of ``compressed`` are.
        dense: vLLM's metadata of the other requests; None when there are none.
        dense_tokens: rows of their tokens, int64, or a slice from ``num_tokens`` on.
    """

    observer: StepDescriber
    spans: tuple[QuerySpan, ...] = ()
    compressed: AttendingBatch | None = None
    num_tokens: int = 0
    dense: Any = None
    dense_tokens: torch.Tensor | slice | None = None

    def attach(self, metadata: Any) -> Any:
        """Let this travel with vLLM's metadata, whose class differs from backend to backend."""
        setattr(metadata, _WORK, self)
        return metadata

    @staticmethod
    def of(metadata: Any) -> HeadPageWork | None:
        """What was attached to vLLM's metadata of a layer; None when nothing was."""
        return getattr(metadata, _WORK, None)
