"""torch's fused attention with the normaliser that its public function keeps to itself."""

from __future__ import annotations

import torch

from vllm_kvzip.model.capped_attention import attend_with_cap


def attend_with_normaliser(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    soft_cap: float | None = None,
    offsets: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by the kernel that serves this device and dtype, or by torch's products.

    Args:
        queries: ``[H, M, D]``.
        keys, values: ``[H, K, D]``.
        scale: softmax scale.
        causal: query ``i`` sees keys ``0 .. i``; M and K are equal then.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; None or 0: they stay.
        offsets: float32 ``[H, M]``, added to all products of a query with keys, before the scale.
        sink_logits: float32 ``[H, M]`` or ``[H, 1]``, a logit of each row that joins its softmax
            and has no value. Where several results are joined, one of them has it.

    Returns:
        ``[H, M, D]`` like the queries, and the log of each softmax's normaliser, float32
        ``[H, M]``.
    """
    if soft_cap:
        attended, log_normaliser = attend_with_cap(
            queries, keys, values, scale, soft_cap, causal=causal, offsets=offsets
        )
    else:
        attended, log_normaliser = _attend(queries, keys, values, scale, causal=causal)
        if offsets is not None:
            log_normaliser = log_normaliser + offsets * scale
    if sink_logits is not None:
        share = (log_normaliser - sink_logits).sigmoid()[..., None]  # of all keys together
        attended = (attended * share).to(queries.dtype)
        log_normaliser = log_normaliser.logaddexp(sink_logits)
    return attended, log_normaliser


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's fused kernels."""
    # They take every vector for contiguous, whatever its strides say.
    batch = tuple(
        (half if half.stride(-1) == 1 else half.contiguous())[None]
        for half in (queries, keys, values)
    )
    aten = torch.ops.aten
    if queries.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        attended, log_normaliser = flash(*batch, 0.0, causal, scale=scale)
    elif queries.dtype is torch.float32:
        efficient = aten._scaled_dot_product_efficient_attention
        attended, log_normaliser, *_ = efficient(*batch, None, True, 0.0, causal, scale=scale)
        log_normaliser = log_normaliser[:, :, : queries.shape[1]]  # padded to a multiple of 32
    else:
        flash = aten._scaled_dot_product_flash_attention
        attended, log_normaliser, *_ = flash(*batch, 0.0, causal, False, scale=scale)
    return attended[0], log_normaliser[0]
