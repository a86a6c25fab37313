"""What a run was computed from, for whoever takes it to another engine."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.vllm_bridge.symbols import Request


@dataclass(frozen=True)
class RunSource:
    """The tokens of a run.

    Attributes:
        token_ids: those before the boundary.
        stays: what its hash covers beside tokens, so that it stays in its engine; None: nothing.
    """

    token_ids: Sequence[int]
    stays: str | None = None

    @classmethod
    def of(cls, request: Request, boundary_tokens: int) -> RunSource:
        """Of a run that a request's prompt was compressed into."""
        reasons = {
            "a LoRA adapter": request.lora_request,
            "a cache_salt": request.cache_salt,
            "multimodal inputs": request.mm_features,
            "prompt embeddings": request.prompt_embeds is not None,
        }
        stays = next((reason for reason, found in reasons.items() if found), None)
        return cls(array("i", request.all_token_ids[:boundary_tokens]), stays)

    @cached_property
    def context_id(self) -> str:
        """By which the contexts endpoint lists it."""
        return checksum(prefix_seed(self.token_ids, len(self.token_ids)))
