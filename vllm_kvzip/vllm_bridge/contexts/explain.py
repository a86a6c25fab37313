"""What compression kept of a document: by layer, KV head and token, with the text of each token.

A document is computed and compressed afresh for this. Workers record the positions of that one
request (:mod:`vllm_kvzip.vllm_bridge.contexts.kept_records`); no other request pays for it. The
compressed context stays in the prefix cache, unless it was cached before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip import __version__
from vllm_kvzip.errors import RequestError
from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed
from vllm_kvzip.planning.request_options import CONTEXT_TOKENS, KEEP_RATIO
from vllm_kvzip.vllm_bridge.contexts.context_rule import OUTPUT_TOKENS, plan_context
from vllm_kvzip.vllm_bridge.contexts.token_texts import token_texts
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    SamplingParams,
    cached_tokenizer_from_config,
    vllm_version,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

RECORD, TAKE = "kvzip_record_kept", "kvzip_kept"
"""Methods of our worker; the second one may be called again, and tells nothing then."""


def check_explains(vllm_config: VllmConfig, num_engines: int = 1) -> None:
    """Refuse engines whose KV heads or layers lie in several places.

    Args:
        vllm_config: of the engine.
        num_engines: among which a server shares its requests.

    Raises:
        RequestError: in one sentence for the client.
    """
    parallel = vllm_config.parallel_config
    sizes = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": max(parallel.data_parallel_size, num_engines),
    }
    for name, size in sizes.items():
        if size > 1:
            raise RequestError(
                f"What compression keeps cannot be shown with {name} {size} yet; ask a server of "
                f"the same settings with one rank."
            )
    if vllm_config.model_config.skip_tokenizer_init:
        raise RequestError(
            "What compression keeps is shown with the text of each token, and this server has no "
            "tokenizer; start it without --skip-tokenizer-init."
        )


def context_params(num_tokens: int, keep_ratio: float | None, afresh: bool) -> SamplingParams:
    """Sampling parameters of a request that does nothing but compress its whole prompt.

    Args:
        num_tokens: of the prompt.
        keep_ratio: its own; None: the server's.
        afresh: without starting from anything that is cached.
    """
    return SamplingParams(
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={CONTEXT_TOKENS: num_tokens, KEEP_RATIO: keep_ratio},
        skip_reading_prefix_cache=True if afresh else None,
    )


@dataclass(frozen=True)
class ExplainedContext:
    """A document that has been compressed while a worker recorded it.

    Attributes:
        vllm_config: of the engine.
        token_ids: of the document.
        plan: of its compression.
        told: what the scheduler told of it.
        kept: what the worker recorded, see :meth:`KeptRecords.take`; None: nothing.
    """

    vllm_config: VllmConfig
    token_ids: Sequence[int]
    plan: PrefixPlan
    told: dict[str, Any]
    kept: dict[str, Any] | None

    def as_told(self) -> dict[str, Any]:
        """What a client is told, as plain values; decodes every token.

        Returns:
            ``id``, ``tokens`` and what :meth:`PrefixPlan.as_told` says; ``bytes_before`` and
            ``bytes_held``, of the compressed layers' blocks; ``layers``, their numbers in the
            model; ``kv_heads``; ``tiers``, each with ``quantized`` and ``kept``, the bits of each
            layer's heads (:func:`vllm_kvzip.report.bitmaps.unpack`) as base64; ``sink_tokens`` and
            ``recent_tokens``, which every head keeps; ``token_texts``; ``settings``, ``model``,
            ``versions``, and ``created`` in seconds since 1970.

        Raises:
            RequestError: if nothing has been recorded, in one sentence.
        """
        plan, kept = self.plan, self.kept
        if kept is None or kept["compressed_tokens"] != plan.boundary_tokens:
            raise RequestError(
                "What was kept of the context was not recorded, as too many were asked for at "
                "once; ask again."
            )
        about = {**plan.as_told(), **self.told}
        block_bytes = kept["block_bytes"]
        tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        return {
            "id": checksum(prefix_seed(self.token_ids, plan.boundary_tokens)),
            "tokens": len(self.token_ids),
            **about,
            "bytes_before": about["blocks_before"] * block_bytes,
            "bytes_held": about["blocks_held"] * block_bytes,
            **{name: kept[name] for name in ("layers", "kv_heads", "tiers")},
            "sink_tokens": plan.num_sink_tokens,
            "recent_tokens": plan.num_recent_tokens,
            "token_texts": token_texts(tokenizer, self.token_ids),
            "settings": self._settings(kept["scorer"], about.get("estimated_loss")),
            "model": str(self.vllm_config.model_config.model),
            "versions": {"vllm-kvzip": __version__, "vllm": vllm_version},
            "created": time.time(),
        }

    def _settings(self, scorer: str, estimated_loss: float | None) -> dict[str, Any]:
        settings = Settings.from_vllm_config(self.vllm_config)
        config = settings.config
        found = {
            "mode": config.mode,
            "scorer": scorer,
            "budget": settings.budget,
            "keep_ratio": self.plan.keep_ratio,
            "block_size": self.plan.boundary_tokens // self.plan.num_prefix_blocks,
            "quality_loss": self.plan.quality_loss,
            "estimated_loss": estimated_loss,
            "by_bytes": config.keep_bytes_ratio is not None or None,
        }
        if config.mode != "evict":
            found |= {"key_format": config.key_format, "value_format": config.value_format}
        return {name: value for name, value in found.items() if value is not None}


def explain_context(
    llm: Any, prompt: str | Sequence[int], keep_ratio: float | None = None
) -> dict[str, Any]:
    """Compress a document in an ``LLM``, and tell what each head keeps of it.

    Args:
        llm: vLLM's ``LLM``, which compresses and has no other request.
        prompt: text or token ids.
        keep_ratio: of this document; None: the engine's.

    Returns:
        see :meth:`ExplainedContext.as_told`.

    Raises:
        RequestError: if it cannot be compressed, or its heads lie in several places.
    """
    engine = llm.llm_engine
    config = engine.vllm_config
    if KEY not in (config.additional_config or {}):
        raise RequestError("KV compression is off; start vLLM with --kv-compression kvzip.")
    check_explains(config)
    token_ids: list[int] = (
        cached_tokenizer_from_config(config.model_config).encode(prompt)
        if isinstance(prompt, str)
        else list(prompt)
    )
    plan = plan_context(config, len(token_ids), keep_ratio)
    request_id = f"kvzip-explain-{time.monotonic_ns()}"
    llm.collective_rpc(RECORD, args=(request_id,))
    params = context_params(len(token_ids), keep_ratio, afresh=True)
    engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)
    told: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            told = (output.kv_transfer_params or {}).get(KEY, {})
    (kept,) = llm.collective_rpc(TAKE, args=(request_id,))
    if (reason := told.pop("left_alone", None)) in FAILURES:
        raise RequestError(f"The context could not be compressed ({reason}); see the log.")
    return ExplainedContext(config, token_ids, plan, told, kept).as_told()
