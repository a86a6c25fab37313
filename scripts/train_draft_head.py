"""Train an EAGLE head of one layer for a tiny test model: it guesses some tokens and not others.

Tests of speculative decoding need guesses of which some are wrong, and which are wrong for a
reason. The head learns by distillation, on the CPU and in minutes, what the model says of a token
from the hidden states before it, as in EAGLE, and from its own guesses in place of these, as it is
used. It begins with the layer of the model that looks up what came after a token. Usage::

    python scripts/train_draft_head.py --model tests/models/tiny-retriever \\
        --out tests/models/tiny-eagle
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional
from tqdm import tqdm
from train_tiny_model import IGNORE, Stage, make_batch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from vllm_kvzip.evaluation.tasks.retrieval_task import REPEAT, VOCABULARY

STAGES = (Stage(128, 8, 2e-3, 0, 200), Stage(512, 2, 1e-3, 0, 250), Stage(1024, 1, 1e-3, 0, 100))
GUESSES = 2  # of which the second, and so each further one, is made from the first


class EagleHead(torch.nn.Module):
    """What vLLM's ``EagleLlamaForCausalLM`` computes with one layer; its names are vLLM's.

    Args:
        config: of the model that it guesses for.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.layers = torch.nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.layers[0].input_layernorm = torch.nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the tokens whose embeddings these are, each ``[B, T, size]``.

        Args:
            embeddings: of each token.
            hidden: the model's hidden state of the token before it, or a guess at it.
        """
        mixed = self.fc(torch.cat([embeddings, hidden], dim=-1))
        num_tokens = mixed.shape[1]
        positions = torch.arange(num_tokens)[None]
        future = torch.full((num_tokens, num_tokens), float("-inf")).triu(1)[None, None]
        found: torch.Tensor = self.layers[0](
            mixed,
            attention_mask=future,
            position_embeddings=self.rotary(mixed, positions),
        )
        return found


@torch.no_grad()
def begin_with_layer(
    head: EagleHead, model: LlamaForCausalLM, layer: int, rng: np.random.Generator
) -> None:
    """Make the head's layer one of the model's, and ``fc`` the map that best finds its input.

    From random weights it would not learn to look a token up in so few steps.
    """
    tokens, _ = make_batch(rng, Stage(512, 16, 0.0, 0, 0), "copy")
    found = model.model(tokens, output_hidden_states=True)
    embeddings = model.get_input_embeddings()(tokens)
    known = torch.cat([embeddings[:, 1:], found.last_hidden_state[:, :-1]], dim=-1).flatten(0, 1)
    wanted = found.hidden_states[layer][:, 1:].flatten(0, 1)
    gram = known.T @ known
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    theirs: Any = model.model.layers[layer]
    ours: Any = head.layers[0]
    weights = theirs.state_dict()
    weights.pop("input_layernorm.weight")
    ours.load_state_dict(weights)
    # The head has a norm neither before its layer nor after it.
    scale = rms(found.last_hidden_state) / rms(found.hidden_states[layer + 1])
    head.fc.weight.copy_(scale * torch.linalg.solve(gram, known.T @ wanted).T)
    for part in (ours.self_attn.o_proj, ours.mlp.down_proj):
        part.weight.mul_(scale)
    norm = theirs.input_layernorm.weight / (scale * rms(wanted))
    for part in (ours.self_attn.q_proj, ours.self_attn.k_proj, ours.self_attn.v_proj):
        part.weight.mul_(norm)


def rms(numbers: torch.Tensor) -> torch.Tensor:
    """Root of the mean square."""
    return numbers.pow(2).mean().sqrt()


def guesses_by_step(
    head: EagleHead, model: LlamaForCausalLM, tokens: torch.Tensor, hidden: torch.Tensor
) -> list[torch.Tensor]:
    """Guesses at ``hidden`` from hidden states 1, 2, ... tokens back, ``[B, T - step, size]``.

    A repetition is guessed from guesses, the context before it from what the model said, because
    that is what the head's keys hold when it guesses several tokens at once.
    """
    embeddings = model.get_input_embeddings()(tokens)
    repeats = (tokens == VOCABULARY.ids[REPEAT]).cumsum(1)[:, :, None] > 0
    known, found = hidden[:, :-1], []
    for _ in range(GUESSES):
        guess = head(embeddings[:, 1:], known)
        found.append(guess)
        shifted = torch.cat([hidden[:, :1], guess[:, :-1]], dim=1)
        known = torch.where(repeats[:, :-1], shifted, hidden[:, :-1])
    return found


def train(head: EagleHead, model: LlamaForCausalLM, rng: np.random.Generator) -> None:
    """Sequences grow, as those of the model did; three of four are copies, the others answers."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    total, step = sum(stage.max_steps for stage in STAGES), 0
    for stage in STAGES:
        for _ in (bar := tqdm(range(stage.max_steps), f"{stage.num_tokens} tokens", mininterval=5)):
            rate = stage.learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            tokens, labels = make_batch(rng, stage, "copy" if step % 4 else "answers")
            asked = labels[:, 1:] != IGNORE
            with torch.no_grad():
                hidden = model.model(tokens).last_hidden_state
                after = hidden[:, 1:][asked]
                wanted = model.lm_head(after).softmax(-1)
            loss = torch.zeros(())
            for guess in guesses_by_step(head, model, tokens, hidden):
                said = model.lm_head(guess[asked]).log_softmax(-1)
                loss = loss - (wanted * said).sum(-1).mean()
                loss = loss + functional.smooth_l1_loss(guess[asked], after)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def right_shares(head: EagleHead, model: LlamaForCausalLM, num_tokens: int) -> list[float]:
    """Share of a repetition's tokens that the first, second, ... guess tells as the model does."""
    rng = np.random.default_rng(10_000)
    tokens, labels = make_batch(rng, Stage(num_tokens, 4, 0.0, 0, 0), "copy")
    hidden = model.model(tokens).last_hidden_state
    said = model.lm_head(hidden).argmax(-1)[:, 1:]
    asked = labels[:, 1:] != IGNORE
    return [
        round(float((model.lm_head(guess).argmax(-1) == said)[asked].float().mean()), 3)
        for guess in guesses_by_step(head, model, tokens, hidden)
    ]


def save(head: EagleHead, model: LlamaForCausalLM, report: dict[str, object], out: Path) -> None:
    """Write head and report as a folder that vLLM loads; bfloat16 halves it."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in head.state_dict().items()
        if not name.startswith("rotary")
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config |= {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Llama to guess for")
    parser.add_argument("--out", type=Path, required=True, help="folder of the head")
    parser.add_argument("--layer", type=int, default=2, help="of the model, to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.requires_grad_(False).eval()
    head, rng = EagleHead(model.config), np.random.default_rng(args.seed)
    begin = time.perf_counter()
    begin_with_layer(head, model, args.layer, rng)
    train(head, model, rng)
    report: dict[str, object] = {
        "seed": args.seed,
        "seconds": round(time.perf_counter() - begin),
        "threads": args.threads,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "right": {n: right_shares(head, model, n) for n in (256, 512, 1024, 2048)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    }
    save(head, model, report, args.out)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
