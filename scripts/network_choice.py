"""Train the networks of scorer ``surrogate`` towards several targets; keep those that cost least.

A pair's influence chooses better than KVzip's attention on a language model, and worse on models
of a few layers whose heads rest on any one of many equal tokens: each alone can be missed, all of
them cannot. So both are tried on a context that no network has seen: the model repeats it while
each head sees only what the networks would keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from documents import Document, Question
from reconstruction_probe import layers_of, rotary_of

from vllm_kvzip.calibration import NETWORK_TOKENS
from vllm_kvzip.rotary import unrotated
from vllm_kvzip.selection import protect
from vllm_kvzip.surrogate import MIN_LOG_SCORE
from vllm_kvzip.surrogate_training import ATTENTION_FLOOR, SurrogateTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from masked_model import MaskedModel
    from transformers import DynamicCache

    from vllm_kvzip.surrogate import LayerSurrogate

FLOORS = {"influence": MIN_LOG_SCORE, "attention": ATTENTION_FLOOR}
NUM_SINKS, NUM_RECENT = 4, 16  # as the engine protects them


class NetworkChoice:
    """One trainer per target.

    Args:
        model: whose KV pairs are scored.
        context_tokens: length of the longest context.
        width: of the networks.
        seed: of the training.
    """

    KEEP_RATIOS: ClassVar = (0.3, 0.2, 0.1)
    NUM_TARGETS: ClassVar = len(FLOORS)

    def __init__(self, model: MaskedModel, context_tokens: int, width: int, seed: int) -> None:
        self._model = model
        self._rotary = rotary_of(model.model, context_tokens)
        num_layers = model.fingerprint.num_layers
        self._trainers = {
            target: SurrogateTrainer(num_layers, NETWORK_TOKENS, width, seed, floor)
            for target, floor in FLOORS.items()
        }
        self.target = ""
        self.report: list[str] = []

    def add(
        self,
        cache: Sequence[tuple[torch.Tensor, torch.Tensor]],
        influence: torch.Tensor,
        attention: torch.Tensor,
    ) -> None:
        """Take in one context.

        Args:
            cache: each layer's keys and values after the prefill, ``[H, T, D]``.
            influence, attention: float32 ``[L, H, T]``, the two targets.
        """
        for trainer, scores in zip(self._trainers.values(), (influence, attention), strict=True):
            trainer.add(cache, scores, self._rotary)

    def best(
        self,
        context: Sequence[int],
        cache: DynamicCache,
        repeat_ids: Sequence[int],
        progress: Callable[[], Any] = lambda: None,
    ) -> list[LayerSurrogate]:
        """Fit all networks; those under which the model repeats a new context best.

        Args:
            context: token ids.
            cache: of this context; left as it is.
            repeat_ids: repeat prompt.
            progress: called after each fitted layer.
        """
        document = Document(list(context), [Question(list(repeat_ids), list(context))])
        found: dict[str, tuple[float, list[LayerSurrogate]]] = {}
        for target, trainer in self._trainers.items():
            networks = trainer.fit(progress)
            nats = [
                self._model.nats(document, cache, self._kept(networks, cache, ratio))[0]
                for ratio in self.KEEP_RATIOS
            ]
            found[target] = sum(nats) / len(nats) / len(context), networks
        self.target = min(found, key=lambda target: found[target][0])
        for target, (nats_a_token, _) in found.items():
            self.report.append(
                f"surrogate trained on {target}: {nats_a_token:.3f} nats a token while a new "
                f"context is repeated from {', '.join(map(str, self.KEEP_RATIOS))} of its KV pairs"
                f"{' (taken)' if target == self.target else ''}"
            )
        return found[self.target][1]

    def _kept(
        self, networks: Sequence[LayerSurrogate], cache: DynamicCache, keep_ratio: float
    ) -> torch.Tensor:
        """The pairs that the networks would keep, bool ``[L, H, T]``."""
        scores = torch.stack(
            [
                network.log_scores_of(unrotated(keys.float(), self._rotary), values.float())
                for network, (keys, values) in zip(networks, layers_of(cache), strict=True)
            ]
        )
        scores = protect(scores, NUM_SINKS, NUM_RECENT)
        count = max(1, round(keep_ratio * scores.numel()))
        return scores >= scores.flatten().topk(count).values[-1]
