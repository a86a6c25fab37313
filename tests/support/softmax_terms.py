"""A softmax with what a model adds to it, written out."""

import torch


def weights_of(logits, soft_cap=None, sink=None):
    """Weights of scaled logits ``[..., M, K]``, some of them minus infinity.

    ``sink`` ``[..., M, 1]`` or a number joins the softmax and has no weight here.
    """
    if soft_cap:
        capped = soft_cap * (logits / soft_cap).tanh()
        logits = torch.where(logits == float("-inf"), logits, capped)
    if sink is None:
        return logits.softmax(dim=-1)
    sink = torch.as_tensor(sink, dtype=logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
