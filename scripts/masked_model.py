"""A transformers model that answers while each head sees only the KV pairs it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from reconstruction_probe import ReconstructionProbe
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from documents import Document


class MaskedModel(ReconstructionProbe):
    """A model that scores its context and then answers from what each head keeps of it."""

    _kept: torch.Tensor | None = None

    @torch.inference_mode()
    def answer(
        self, document: Document, cache: DynamicCache, kept: torch.Tensor | None
    ) -> list[list[int]]:
        """Greedy answers to all questions at once; questions, and answers, have one length.

        Args:
            document: context and questions.
            cache: of the context; not changed.
            kept: bool ``[L, H, boundary]``; None is the model's own attention.

        Returns:
            One list of token ids per question, as long as the right answer.
        """
        boundary = len(document.tokens) if kept is None else kept.shape[-1]
        batch = len(document.questions)
        seen = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys[:, :, :boundary], layer.values[:, :, :boundary]
            seen.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        tail = document.tokens[boundary:]
        inputs = torch.tensor([[*tail, *question.tokens] for question in document.questions])
        self._kept = kept
        answers = []
        for _ in document.questions[0].answer:
            logits = self.model(inputs, past_key_values=seen, logits_to_keep=1).logits
            inputs = logits[:, -1:].argmax(dim=-1)
            answers.append(inputs)
        self._kept = None
        return torch.cat(answers, dim=1).tolist()

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """As in the base class; while questions are answered, evicted KV pairs are masked."""
        if self._kept is None:
            return super()._attend(module, query, key, value, mask, **kwargs)
        kept = self._kept[module.layer_idx]  # [H, boundary]
        num_heads, boundary = kept.shape
        rows, own = query.shape[2], key.shape[2] - boundary
        causal = torch.ones(rows, own, dtype=torch.bool).tril(own - rows)
        own_mask = causal.expand(num_heads, -1, -1)
        mask = torch.cat([kept[:, None].expand(-1, rows, -1), own_mask], dim=-1)
        group = query.shape[1] // num_heads
        mask = mask.repeat_interleave(group, dim=0)[None]  # [1, Hq, rows, boundary + own]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
