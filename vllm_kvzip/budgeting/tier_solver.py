"""Which KV pairs deserve full precision, which are quantized, which dropped, for a byte budget?

A pair that is kept as it is counts its score, a quantized one its score less what quantizing loses,
a dropped one nothing; the sum shall be as high as the bytes allow. Both kinds fill their bytes from
the highest score down, so two thresholds decide. With ``k`` the bytes of a quantized pair over
those of one as it is, and ``e`` the loss, a byte earns as much at either threshold when

    score of the last pair kept as it is = (1 - e) / e * (1 - k) / k * score of the last one kept

(Lagrange). With 4 bits, a loss of a tenth makes that factor 25: only pairs that matter far more
than those at the brink of being dropped stay as they are.
"""

from __future__ import annotations

import torch


def solve_tiers(
    scores: torch.Tensor, bytes_ratio: float, token_bytes: float, loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of each head's KV pairs, by one ranking over all layers and heads.

    What is left of the bytes when everything is kept makes more pairs as they are.

    Args:
        scores: ``[L, H, T]``, not negative.
        bytes_ratio: bytes held / bytes of all pairs as they are, in (0, 1].
        token_bytes: bytes of a quantized pair / of one as it is, in (0, 1).
        loss: share of its worth that a pair loses when it is quantized, in (0, 1).

    Returns:
        Kept as they are / all, and kept in either way / all; float64 ``[L, H]``.
    """
    ranked, order = scores.flatten().double().sort(descending=True, stable=True)
    count = len(ranked)
    factor = (1 - loss) / loss * (1 - token_bytes) / token_bytes
    kept = torch.arange(1, count + 1, dtype=torch.float64)
    # How many pairs reach the threshold when the first ``kept`` ones are kept.
    full = torch.searchsorted(-ranked, -factor * ranked, right=True).double().minimum(kept)
    held = full * (1 - token_bytes) + kept * token_bytes
    num_kept = max(1, int((held <= bytes_ratio * count + 1e-9).sum()))
    num_full = int(full[num_kept - 1])
    if num_kept == count:
        spare = (bytes_ratio - token_bytes) * count / (1 - token_bytes)
        num_full = max(num_full, min(count, int(spare + 1e-9)))
    shares = []
    for chosen in (num_full, num_kept):
        mask = torch.zeros(count, dtype=torch.float64)
        mask[order[:chosen]] = 1
        shares.append(mask.view(scores.shape).mean(dim=-1))
    return shares[0], shares[1]
