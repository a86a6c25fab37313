"""Train the networks of scorer ``surrogate`` towards several targets; keep those that cost least.

A pair's influence chooses better than KVzip's attention on a language model, and worse on models
of a few layers whose heads rest on any one of many equal tokens: each alone can be missed, all of
them cannot. So both are tried on a context that no network has seen: the model repeats it while
each head sees only what the networks would keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvzip.budgeting.selection import protect
from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.evaluation.tasks.documents import Document, Question
from vllm_kvzip.head_profiles.calibration import NETWORK_TOKENS
from vllm_kvzip.head_profiles.network_training import ATTENTION_FLOOR, SurrogateTrainer, predict
from vllm_kvzip.head_profiles.networks import MIN_LOG_SCORE
from vllm_kvzip.profiling.context_cache import layers_of
from vllm_kvzip.profiling.probe_rotary import rotary_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import DynamicCache

    from vllm_kvzip.head_profiles.networks import LayerSurrogate
    from vllm_kvzip.profiling.masked_model import MaskedModel

FLOORS = ATTENTION_FLOOR, MIN_LOG_SCORE, MIN_LOG_SCORE
"""Of the scores: attention while repeating, influence on repeating, influence further on."""
DEFAULTS = KVzipConfig()


class NetworkChoice:
    """One trainer for all targets.

    Args:
        model: whose KV pairs are scored.
        context_tokens: length of the longest context.
        width: of the networks.
        seed: of the training.
        following_share: how much the influence on what the text goes on with counts beside that on
            repeating, in [0, 1).
    """

    KEEP_RATIOS: ClassVar = (0.3, 0.2, 0.1)
    NUM_TARGETS: ClassVar = 2

    def __init__(
        self,
        model: MaskedModel,
        context_tokens: int,
        width: int,
        seed: int,
        following_share: float = 0.0,
    ) -> None:
        self._model = model
        influence = {1: 1 - following_share, 2: following_share} if following_share else {1: 1.0}
        self._targets = {"influence": influence, "attention": {0: 1.0}}
        floors = FLOORS if following_share else FLOORS[:2]
        self._rotary = rotary_of(model.model, context_tokens, model.scored)
        num_layers = model.fingerprint.num_layers
        self._trainer = SurrogateTrainer(num_layers, NETWORK_TOKENS, width, seed, floors)
        self.target = ""
        self.report: list[str] = []

    def add(
        self,
        cache: Sequence[tuple[torch.Tensor, torch.Tensor]],
        influence: torch.Tensor,
        attention: torch.Tensor,
        further_on: torch.Tensor | None = None,
    ) -> None:
        """Take in one context.

        Args:
            cache: keys and values of each scored layer after the prefill, ``[H, T, D]``.
            influence, attention: float32 ``[L, H, T]``, while the model repeats the context.
            further_on: float32 ``[L, H, T]``, influence on what the text goes on with; None where
                that does not count.
        """
        more = [] if further_on is None else [further_on]
        self._trainer.add(cache, [attention, influence, *more], self._rotary)

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
        for target, shares in self._targets.items():
            networks = self._trainer.fit(progress, shares)
            scores = predict(networks, layers_of(cache, self._model.scored), self._rotary)
            scores = protect(scores, DEFAULTS.sink_tokens, DEFAULTS.recent_tokens)
            nats = [
                self._model.nats(document, cache, _best(scores, ratio))[0]
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


def _best(scores: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """The best pairs over all layers and heads, bool ``[L, H, T]``."""
    count = max(1, round(keep_ratio * scores.numel()))
    return scores >= scores.flatten().topk(count).values[-1]
