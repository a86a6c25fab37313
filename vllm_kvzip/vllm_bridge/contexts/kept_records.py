"""Worker side: which tokens each head keeps, of requests that somebody wants to see explained.

Nothing is recorded of any other request, and a worker that nobody asks compares one empty
dictionary a compression.
"""

from __future__ import annotations

from base64 import b64encode
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_kvzip.budgeting.kept_positions import KeptPositions, packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.core import CompressedPrefix, PrefixPlan

MOST_RECORDS = 4
"""Requests that are recorded at once; the oldest is forgotten when one more is asked for."""


@dataclass
class _Record:
    kept: KeptPositions = field(default_factory=KeptPositions)
    plan: PrefixPlan | None = None
    prefix: CompressedPrefix | None = None


class KeptRecords:
    """Recorded compressions of a worker, by what their requests' ids begin with.

    vLLM adds characters of its own to the id that a client of the engine gives.

    Args:
        layers: number of each compressed layer in the model.
        block_bytes: bytes of a block in the compressed layers.
        scorer: name of the scorer.
    """

    def __init__(self, layers: Sequence[int], block_bytes: int, scorer: str) -> None:
        self._layers = list(layers)
        self._block_bytes = block_bytes
        self._scorer = scorer
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def want(self, request_id: str) -> None:
        """Record the request of that id, which has not begun."""
        self._records[request_id] = _Record()
        while len(self._records) > MOST_RECORDS:
            self._records.popitem(last=False)

    def of(self, request_id: str, plan: PrefixPlan) -> KeptPositions | None:
        """What a compression of a request is to fill; None where nobody asked for it.

        Once the context is compressed, rounds that its answer makes necessary are left out.

        Args:
            request_id: vLLM's.
            plan: of the compression.
        """
        if not self._records or (record := self._find(request_id)) is None:
            return None
        if record.plan is not None and plan.start_blocks and not record.plan.is_round:
            return None
        if not plan.start_blocks:  # it may have lost its blocks and begin anew
            record.kept = KeptPositions()
        return record.kept

    def compressed(self, request_id: str, plan: PrefixPlan, prefix: CompressedPrefix) -> None:
        """A compression that filled what :meth:`of` gave has ended."""
        record = self._find(request_id)
        assert record is not None
        record.plan, record.prefix = plan, prefix

    def take(self, request_id: str) -> dict[str, Any] | None:
        """What has been recorded of a request, which is forgotten; None where nothing was.

        Waits for the device.

        Args:
            request_id: as in :meth:`want`.

        Returns:
            plain values: numbers of the ``layers`` in the model, ``kv_heads``, ``block_bytes``,
            ``scorer``, ``compressed_tokens``, and ``tiers``, of which each has its bits as base64
            (``kept``; see :func:`packed`) and tells whether it is ``quantized``.
        """
        record = self._records.pop(request_id, None)
        if record is None or record.plan is None or record.prefix is None:
            return None
        if record.prefix.sound is not None and not bool(record.prefix.sound):
            return None
        num_tokens = record.plan.boundary_tokens
        masks = record.kept.masks(num_tokens)
        return {
            "layers": self._layers,
            "kv_heads": masks[0].shape[1],
            "block_bytes": self._block_bytes,
            "scorer": self._scorer,
            "compressed_tokens": num_tokens,
            "tiers": [
                {"quantized": tier.quantized, "kept": b64encode(packed(mask)).decode()}
                for tier, mask in zip(record.plan.tiers, masks, strict=True)
            ],
        }

    def _find(self, request_id: str) -> _Record | None:
        found = (
            record for wanted, record in self._records.items() if request_id.startswith(wanted)
        )
        return next(found, None)
