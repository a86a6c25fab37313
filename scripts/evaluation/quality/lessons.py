"""What a model thinks of given tokens: records of teacher-forced generation.

``teacher_forcing.py`` applies lessons inside a vLLM engine of this process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Lesson:
    """What a request generates, and what is recorded of it, by position from 0.

    Attributes:
        tokens: to be generated; None: the model's own choices.
        length: tokens to be generated where they are the model's own.
        may_end: its own choices end where the model ends its turn.
        output: token ids that were generated; set when the request is done.
        keeps_distributions: record ``distributions``.
        reference: distributions of another request with the same tokens.
        log_likelihoods: of the tokens, nats.
        distributions: float32 ``[V]``, log-probabilities of the next token.
        divergences: KL(reference || this request), nats.
        same_choices: whether the most likely token is the reference's.
    """

    tokens: list[int] | None = None
    length: int = 0
    may_end: bool = False
    output: list[int] = field(default_factory=list)
    keeps_distributions: bool = False
    reference: dict[int, torch.Tensor] | None = None
    log_likelihoods: dict[int, float] = field(default_factory=dict)
    distributions: dict[int, torch.Tensor] = field(default_factory=dict)
    divergences: dict[int, float] = field(default_factory=dict)
    same_choices: dict[int, bool] = field(default_factory=dict)

    def follow(self, logits: torch.Tensor, position: int) -> None:
        """Record a step, then leave only the lesson's token to choose.

        A step may come twice, as when a prefill is cut into chunks or a request is preempted; what
        it says last stands.

        Args:
            logits: float ``[V]``, changed in place.
            position: of the token that they are for.
        """
        log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
        if self.keeps_distributions:
            self.distributions[position] = log_probs.cpu()
        if self.tokens is None or position >= len(self.tokens):
            return
        token = self.tokens[position]
        self.log_likelihoods[position] = float(log_probs[token])
        if self.reference is not None:
            expected = self.reference[position].to(log_probs.device)
            self.divergences[position] = float(divergence(expected, log_probs))
            self.same_choices[position] = bool(expected.argmax() == log_probs.argmax())
        logits.fill_(float("-inf"))
        logits[token] = 0.0


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) in nats, of log-probabilities, both float32 ``[..., V]``."""
    weights = expected.exp()
    return torch.where(weights > 0, weights * (expected - found), 0.0).sum(dim=-1)
