"""torch's fused attention with the normaliser that its public function keeps to itself."""

from __future__ import annotations

import torch


def attend_with_normaliser(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention by the kernel that serves this device and dtype.

    Args:
        queries: ``[H, M, D]``.
        keys, values: ``[H, K, D]``.
        scale: softmax scale.
        causal: query ``i`` sees keys ``0 .. i``; M and K are equal then.

    Returns:
        ``[H, M, D]`` like the queries, and the log of each softmax's normaliser, float32
        ``[H, M]``.
    """
    # The kernels take every vector for contiguous, whatever its strides say.
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
