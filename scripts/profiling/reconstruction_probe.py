"""Run KVzip's reconstruction scoring on a transformers model, layer by layer, while it repeats."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from vllm_kvzip.evaluation.model_files import fingerprint_from_config
from vllm_kvzip.head_profiles.influence import influence_scores, log_odds
from vllm_kvzip.model.attention_kinds import full_attention_layers, sliding_window
from vllm_kvzip.planning.reconstruction import Chunk, iter_chunks, reconstruction_scores
from vllm_kvzip.profiling.context_cache import copy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import DynamicCache

    from vllm_kvzip.head_profiles.head_profile import ModelFingerprint

CHECKED_TOKENS = 256  # of each chunk; logits of a large vocabulary are large

WIDE_WINDOW = 2**30  # tokens; no text is so long

_probe_numbers = itertools.count()


class _Place(NamedTuple):
    """Where things begin in the keys an attention layer sees; the sinks come first."""

    num_sinks: int
    chunk_start: int
    own_start: int


class _Attended(NamedTuple):
    """What one attention layer read and gave in one forward pass, to go back through it."""

    query: torch.Tensor  # [Hq, R, D]
    key: torch.Tensor  # [H, T + R, D]
    value: torch.Tensor  # [H, T + R, D]
    output: torch.Tensor  # [1, R, Hq, D], with its gradient after the backward pass
    scale: float


class ReconstructionProbe:
    """A causal language model whose attention can be watched.

    Layers that attend to the whole context are watched and scored. Beside them, layers with a
    sliding window keep it, and layers with a state go on from the context's last one. Where all
    layers have a window, it slides nowhere; whoever has contexts that it does not hold must not
    ask.

    Args:
        path: folder of the model.
        num_sinks: first tokens every softmax includes.

    Attributes:
        scored: indices of the layers that are scored, among all layers; one for each row of a
            score tensor ``[L, H, T]``.
        row_of: index of a scored layer -> its row.
    """

    def __init__(self, path: str, num_sinks: int = 4) -> None:
        name = f"kvzip_probe_{next(_probe_numbers)}"  # each probe watches its own model only
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        config = AutoConfig.from_pretrained(path)
        text_config = config.get_text_config()
        full = full_attention_layers(text_config)
        if sliding_window(text_config) and not full:
            # The context fits; what repeats it must see it all.
            text_config.sliding_window = WIDE_WINDOW
        self.model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=name
        ).eval()
        self.model.requires_grad_(False)
        self.config = self.model.config.get_text_config()
        self.scored = full or list(range(self.config.num_hidden_layers))
        self.row_of = {index: row for row, index in enumerate(self.scored)}
        self._num_sinks = num_sinks
        self._chunk: Chunk | None = None
        self._context_tokens = 0
        self._place = _Place(0, 0, 0)
        self._scores: torch.Tensor | None = None
        self._repeated: list[float] = []
        self._attended: dict[int, _Attended] | None = None

    @property
    def scores_all(self) -> bool:
        """Whether every layer is scored."""
        return bool(len(self.scored) == self.config.num_hidden_layers)

    @property
    def repeated_share(self) -> float:
        """How much of its contexts the model has repeated right, token by token, in [0, 1].

        A model that does not understand the repeat prompt, or the text, looks at the wrong places
        while it is made to repeat; what it looks at then says nothing.
        """
        return sum(self._repeated) / len(self._repeated)

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What the profile will have to match."""
        name = str(self.model.name_or_path).rstrip("/").split("/")[-1]
        return fingerprint_from_config(self.model.config, name)

    @torch.inference_mode()
    def read(self, context_ids: Sequence[int]) -> DynamicCache:
        """The cache after the prefill of a context."""
        ids = torch.tensor([context_ids])
        found = self.model(ids, use_cache=True, logits_to_keep=1)
        cache: DynamicCache = found.past_key_values
        return cache

    @torch.inference_mode()
    def score(
        self,
        context_ids: Sequence[int],
        chunk_tokens: int,
        first_prompt_ids: Sequence[int],
        later_prompt_ids: Sequence[int],
        progress: Callable[[], Any] = lambda: None,
        local: bool = False,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Scores of every KV pair of a context.

        Args:
            context_ids: token ids.
            chunk_tokens: longest chunk to repeat at once.
            first_prompt_ids, later_prompt_ids: repeat prompts.
            progress: called after each forward pass.
            local: whether a chunk is repeated looking at sinks and chunk only, as the engine does,
                and not at the whole context.
            cache: of this context, if it has been read; left as it is.

        Returns:
            float32 ``[L, H, T]``.
        """
        shape = self.fingerprint
        self._context_tokens = len(context_ids)
        self._scores = torch.zeros(shape.num_layers, shape.num_kv_heads, len(context_ids))
        if cache is None:
            cache = self.read(context_ids)
            progress()
        for chunk in iter_chunks(context_ids, chunk_tokens, first_prompt_ids, later_prompt_ids):
            self._chunk = chunk
            num_sinks = min(self._num_sinks, chunk.start)
            self._place = _Place(num_sinks, chunk.start, self._context_tokens)
            positions: list[int] | slice = slice(None)
            if local:
                self._place = _Place(num_sinks, num_sinks, num_sinks + chunk.end - chunk.start)
                positions = [*range(num_sinks), *range(chunk.start, chunk.end)]
            first = self._context_tokens
            num_checked = min(CHECKED_TOKENS, chunk.end - chunk.start)
            logits = self.model(
                torch.tensor([chunk.input_ids]),
                past_key_values=copy_of(cache, self.scored, positions),
                position_ids=torch.arange(first, first + len(chunk.input_ids))[None],
                logits_to_keep=num_checked + 1,
            ).logits
            predicted = logits[0, :-1].argmax(-1)
            right = predicted == torch.tensor(chunk.input_ids[-num_checked:])
            self._repeated.append(float(right.float().mean()))
            self._chunk = None
            progress()
        return self._scores

    def influence(
        self,
        context_ids: Sequence[int],
        chunk_tokens: int,
        first_prompt_ids: Sequence[int],
        later_prompt_ids: Sequence[int],
        progress: Callable[[], Any] = lambda: None,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Influence of every KV pair of a context while the model repeats it.

        See :mod:`vllm_kvzip.head_profiles.influence`.

        Args:
            context_ids: token ids.
            chunk_tokens: longest chunk to repeat at once.
            first_prompt_ids, later_prompt_ids: repeat prompts.
            progress: called after each pass forward and back.
            cache: of this context, if it has been read; left as it is.

        Returns:
            float32 ``[L, H, T]``, not negative.
        """
        shape, num_tokens = self.fingerprint, len(context_ids)
        scores = torch.zeros(shape.num_layers, shape.num_kv_heads, num_tokens)
        cache = self.read(context_ids) if cache is None else cache
        for chunk in iter_chunks(context_ids, chunk_tokens, first_prompt_ids, later_prompt_ids):
            pairs = slice(chunk.start, chunk.end)
            num_asked = chunk.end - chunk.start
            scores[:, :, pairs] = self._influence(
                cache, num_tokens, chunk.input_ids, num_asked, pairs
            )
            progress()
        return scores

    def influence_further_on(
        self,
        context_ids: Sequence[int],
        following_ids: Sequence[int],
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Influence of every KV pair of a context on what the text goes on with.

        Args:
            context_ids: token ids.
            following_ids: token ids of what follows in the same text, at least two.
            cache: of this context, if it has been read; left as it is.

        Returns:
            float32 ``[L, H, T]``, not negative.
        """
        cache = self.read(context_ids) if cache is None else cache
        num_tokens = len(context_ids)
        return self._influence(
            cache, num_tokens, following_ids, len(following_ids) - 1, slice(0, num_tokens)
        )

    def _influence(
        self,
        cache: DynamicCache,
        num_tokens: int,
        input_ids: Sequence[int],
        num_asked: int,
        pairs: slice,
    ) -> torch.Tensor:
        """Influence of some KV pairs on the last ``num_asked`` tokens read after a context.

        Args:
            cache: of the context; left as it is.
            num_tokens: of the context.
            input_ids: what is read after it.
            num_asked: how many of these tokens count, not all of them.
            pairs: of the context.
        """
        ids = torch.tensor(input_ids)
        embed = self.model.get_input_embeddings()
        self._attended = {}
        try:
            logits = self.model(
                inputs_embeds=embed(ids)[None].requires_grad_(True),
                past_key_values=copy_of(cache, self.scored),
                position_ids=torch.arange(num_tokens, num_tokens + len(ids))[None],
                logits_to_keep=num_asked + 1,
            ).logits
            torch.autograd.backward(log_odds(logits[0, :-1], ids[-num_asked:]).sum())
            attended = self._attended
        finally:
            self._attended = None
        rows = []
        for _, (query, key, value, output, scale) in sorted(attended.items()):
            assert output.grad is not None
            rows.append(
                influence_scores(
                    query,
                    key,
                    value,
                    output.detach()[0].transpose(0, 1),
                    output.grad[0].transpose(0, 1),
                    scale,
                    pairs,
                )
            )
        return torch.stack(rows)

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """transformers' attention function: ``query [1, Hq, R, D]``, ``key [1, H, T + R, D]``."""
        row = self.row_of.get(module.layer_idx)
        if row is None:
            return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        scale = kwargs.get("scaling")  # OPT scales its queries before, and says 1 here
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._chunk is not None and self._scores is not None:
            chunk, keys = self._chunk, key[0]
            num_heads = keys.shape[0]
            queries = query[0].unflatten(0, (num_heads, -1)).permute(2, 0, 1, 3)  # [R, H, G, D]
            place = self._place
            chunk_end = place.chunk_start + chunk.end - chunk.start
            self._scores[row, :, chunk.start : chunk.end] = reconstruction_scores(
                queries,
                keys[:, : place.num_sinks],
                keys[:, place.chunk_start : chunk_end],
                keys[:, place.own_start :],
                scale,
            )
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        if self._attended is not None:
            output.retain_grad()
            self._attended[row] = _Attended(
                query.detach()[0], key.detach()[0], value.detach()[0], output, scale
            )
        return output, weights
