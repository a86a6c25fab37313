"""A transformers model that answers while each head sees only the KV pairs it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_kvzip.profiling.context_cache import copy_of
from vllm_kvzip.profiling.reconstruction_probe import ReconstructionProbe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import DynamicCache

    from vllm_kvzip.evaluation.tasks.documents import Document


class MaskedModel(ReconstructionProbe):
    """A model that scores its context and then answers from what each head keeps of it."""

    _kept: torch.Tensor | None = None

    @torch.inference_mode()
    def answer(
        self, document: Document, cache: DynamicCache, kept: torch.Tensor | None
    ) -> list[list[int]]:
        """Greedy answers to all questions.

        Args:
            document: context and questions.
            cache: of the context; not changed.
            kept: bool ``[L, H, boundary]``; None is the model's own attention.

        Returns:
            One list of token ids per question, as long as the right answer.
        """
        answers: list[list[int]] = [[] for _ in document.questions]
        for places, seen, inputs in self._batches(document, cache, kept):
            found = []
            for _ in document.questions[places[0]].answer:
                inputs = self.logits(inputs, seen, kept, 1)[:, -1:].argmax(dim=-1)
                found.append(inputs)
            for place, answer in zip(places, torch.cat(found, dim=1).tolist(), strict=True):
                answers[place] = answer
        return answers

    @torch.inference_mode()
    def nats(
        self, document: Document, cache: DynamicCache, kept: torch.Tensor | None
    ) -> tuple[float, int]:
        """Negative log-likelihood of the right answers' scored tokens, and how many those are.

        Args:
            document: context and questions.
            cache: of the context; not changed.
            kept: bool ``[L, H, boundary]``; None is the model's own attention.
        """
        total, count = 0.0, 0
        for places, seen, inputs in self._batches(document, cache, kept):
            questions = [document.questions[place] for place in places]
            answers = torch.tensor([question.answer for question in questions])
            inputs = torch.cat([inputs, answers[:, :-1]], dim=1)
            logits = self.logits(inputs, seen, kept, answers.shape[1])
            lost = -logits.log_softmax(dim=-1).gather(2, answers[..., None]).squeeze(-1)
            for row, question in zip(lost, questions, strict=True):
                total += float(row[question.scored_places].sum())
                count += len(question.scored_places)
        return total, count

    def _batches(
        self, document: Document, cache: Any, kept: torch.Tensor | None
    ) -> Iterator[tuple[list[int], DynamicCache, torch.Tensor]]:
        """Places of questions of equal lengths, their cache, and what they read next."""
        boundary = len(document.tokens) if kept is None else kept.shape[-1]
        tail = document.tokens[boundary:]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, question in enumerate(document.questions):
            groups.setdefault((len(question.tokens), len(question.answer)), []).append(place)
        if tail and not self.scores_all:  # windows and states cannot be taken back to the boundary
            cache = self.read(document.tokens[:boundary])
        for places in groups.values():
            seen = copy_of(cache, self.scored, slice(boundary), len(places))
            asked = [[*tail, *document.questions[place].tokens] for place in places]
            yield places, seen, torch.tensor(asked)

    def logits(
        self, inputs: torch.Tensor, seen: DynamicCache, kept: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        """Logits of the last ``count`` inputs, ``[B, count, vocabulary]``; the cache grows.

        Args:
            inputs: int64 ``[B, n]``.
            seen: the cache before them.
            kept: bool ``[L, H, boundary]``; None is the model's own attention.
            count: up to n.
        """
        self._kept = kept
        try:
            logits: torch.Tensor = self.model(
                inputs, past_key_values=seen, logits_to_keep=count
            ).logits
        finally:
            self._kept = None
        return logits

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """As in the base class; while questions are answered, evicted KV pairs are masked."""
        row = self.row_of.get(module.layer_idx)
        if self._kept is None or row is None:
            return super()._attend(module, query, key, value, mask, **kwargs)
        kept = self._kept[row]  # [H, boundary]
        num_heads, boundary = kept.shape
        rows, own = query.shape[2], key.shape[2] - boundary
        causal = torch.ones(rows, own, dtype=torch.bool).tril(own - rows)
        own_mask = causal.expand(num_heads, -1, -1)
        mask = torch.cat([kept[:, None].expand(-1, rows, -1), own_mask], dim=-1)
        group = query.shape[1] // num_heads
        mask = mask.repeat_interleave(group, dim=0)[None]  # [1, Hq, rows, boundary + own]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
