"""Train a tiny test model: under 1 M parameters, and it retrieves and copies.

A random model cannot tell a good eviction from a bad one, and no model can be downloaded in the
tests. This one learns, on the CPU and in minutes, to answer questions about a context and to repeat
it (:mod:`retrieval_task`), so it has real retrieval heads. Usage::

    python scripts/train_tiny_model.py --out tests/models/tiny-retriever

``--architecture granite`` and the flags of its shape make a model of another kind, ``--tasks`` one
that answers more kinds of questions (``word_tasks.py``); begin with a model that retrieves::

    python scripts/train_tiny_model.py --architecture granite --heads 6 --kv-heads 2 \\
        --head-dim 64 --seed 1 --out /tmp/base
    python scripts/train_tiny_model.py --init /tmp/base --min-tokens 128 --max-tokens 512 \\
        --tasks multi-value chain most --out /tmp/tracker

``--layer-types`` makes a model whose layers differ. One with sliding windows can begin with the
weights of a Llama::

    python scripts/train_tiny_model.py --architecture ministral --window 64 \\
        --layer-types sliding_attention sliding_attention full_attention full_attention \\
        --init tests/models/tiny-retriever --min-tokens 128 --out /tmp/windowed
    python scripts/train_tiny_model.py --architecture lfm2 --heads 4 --kv-heads 2 \\
        --layer-types conv full_attention conv full_attention --max-tokens 1024 --out /tmp/convolved

Sequences grow from 32 to 2,048 tokens; the next length begins once both accuracies pass 0.985.
Retrieval appears suddenly, after a plateau at 0.35-0.45, and at a step that depends on the seed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MinistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vllm_kvzip.evaluation.tasks.retrieval_task import (
    PERIOD,
    QUESTION,
    REPEAT,
    SPECIAL_WORDS,
    VOCABULARY,
    copy_prompt,
    make_context,
    question_prompt,
)
from vllm_kvzip.evaluation.tasks.word_tasks import EXTRA_TASKS, TASKS

IGNORE = -100
TARGET_ACCURACY = 0.985
ARCHITECTURES = {
    "llama": LlamaConfig,
    "granite": GraniteConfig,  # a Llama with biases
    "ministral": MinistralConfig,  # a Llama, of which some layers have a sliding window
    "lfm2": Lfm2Config,  # some layers are short convolutions
}
VLLM_CLASSES = {"ministral": "MistralForCausalLM"}  # where vLLM's differs from transformers'


@dataclass(frozen=True)
class Stage:
    """One length of the curriculum; ``min_steps`` are run even if the accuracy is there."""

    num_tokens: int
    batch_size: int
    learning_rate: float
    min_steps: int
    max_steps: int


STAGES = (
    Stage(32, 96, 2e-3, 100, 3000),
    Stage(64, 64, 2e-3, 50, 3000),
    Stage(128, 32, 2e-3, 50, 600),
    Stage(256, 16, 2e-3, 50, 600),
    Stage(512, 8, 1e-3, 80, 600),
    Stage(1024, 4, 1e-3, 600, 600),
    Stage(2048, 2, 6e-4, 400, 400),
)


def question_sequence(rng: np.random.Generator, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A context and many questions: tokens and labels, each int64 ``[num_tokens]``."""
    num_questions = max(1, min(num_tokens // 6, 128) if num_tokens <= 1024 else 200)
    context = make_context(rng, num_tokens - 4 * num_questions)
    keys = rng.choice(list(context.facts), num_questions)
    answers = np.array([context.facts[key] for key in keys.tolist()])
    rows = np.empty((num_questions, 4), dtype=np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2] = VOCABULARY.ids[QUESTION], keys, answers
    rows[:, 3] = VOCABULARY.ids[PERIOD]
    labels = np.full((num_questions, 4), IGNORE)
    labels[:, 2:] = rows[:, 2:]
    tokens = np.concatenate([context.tokens, rows.ravel()])
    padding = np.full(len(context.tokens), IGNORE)
    return tokens, np.concatenate([padding, labels.ravel()])


def copy_sequence(rng: np.random.Generator, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A context and its rotated repetition: tokens and labels, each int64 ``[num_tokens]``.

    A fixed offset would teach the distance instead of the content, hence the rotation.
    """
    context = make_context(rng, num_tokens // 2)
    rest = num_tokens - len(context.tokens) - 1
    rotated = np.resize(np.roll(context.tokens, -rng.integers(len(context.tokens))), rest)
    tokens = np.concatenate([context.tokens, [VOCABULARY.ids[REPEAT]], rotated])
    labels = np.full(num_tokens, IGNORE)
    labels[-rest + 4 :] = rotated[4:]
    return tokens, labels


def task_sequence(
    rng: np.random.Generator, num_tokens: int, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """A context and questions of another task: tokens and labels, each int64 ``[num_tokens]``."""
    make = TASKS[task]
    question = make(np.random.default_rng(0), 64, 1).questions[0]
    room = len(question.tokens) + len(question.answer) + 1
    count = 1 if task == "most" else max(1, min(num_tokens // (3 * room), 64))
    document = make(rng, num_tokens - count * room, count)
    tokens, labels = list(document.tokens), [IGNORE] * len(document.tokens)
    for number in range(count):
        question = document.questions[number % len(document.questions)]
        answer = [*question.answer, VOCABULARY.ids[PERIOD]]
        tokens += [*question.tokens, *answer]
        labels += [*[IGNORE] * len(question.tokens), *answer]
    return np.array(tokens), np.array(labels)


def make_batch(
    rng: np.random.Generator, stage: Stage, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of one step, int64 ``[batch_size, num_tokens]``."""
    makers = {"copy": copy_sequence, "answers": question_sequence}
    make = makers.get(kind) or partial(task_sequence, task=kind)
    rows = [make(rng, stage.num_tokens) for _ in range(stage.batch_size)]
    tokens, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return tokens, labels


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """A fresh model of the asked shape."""
    config = ARCHITECTURES[args.architecture](
        vocab_size=len(VOCABULARY.words),
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_positions,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
        **{
            "granite": {"attention_bias": True},
            "ministral": {"sliding_window": args.window},
            "lfm2": {  # most of it is for vLLM, which needs every field of a published one
                "block_auto_adjust_ff_dim": False,
                "block_dim": args.hidden,
                "block_ffn_dim_multiplier": 1.0,
                "block_multiple_of": 32,
                "conv_dim": args.hidden,
            },
        }.get(args.architecture, {}),
        **({"layer_types": args.layer_types} if args.layer_types else {}),
    )
    if args.architecture == "granite":  # which has its softmax scale as a setting
        config.attention_multiplier = args.head_dim**-0.5
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def model_to_train(args: argparse.Namespace) -> PreTrainedModel:
    """A fresh model, that of ``--init``, or a fresh one with the weights of ``--init``."""
    if args.init is None:
        return build_model(args)
    first: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    if args.layer_types is None:
        return first
    model = build_model(args)
    model.resize_token_embeddings(first.config.vocab_size)
    model.load_state_dict(first.state_dict())
    return model


def train(
    model: PreTrainedModel, rng: np.random.Generator, stages: list[Stage], tasks: list[str]
) -> int:
    """Run the curriculum, one kind of sequence after the other; returns the number of steps."""
    kinds = ["copy", "answers", *tasks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=stages[0].learning_rate, betas=(0.9, 0.98))
    step = 0
    for stage in stages:
        accuracy = dict.fromkeys(kinds, 0.0)
        bar = tqdm(range(stage.max_steps), desc=f"{stage.num_tokens} tokens", mininterval=5)
        for stage_step in bar:
            rate = stage.learning_rate * min(1.0, (step + 1) / 100)
            if stage is stages[-1]:
                rate *= 1 - stage_step / stage.max_steps
            for group in optimizer.param_groups:
                group["lr"] = rate
            kind = kinds[step % len(kinds)]
            tokens, labels = make_batch(rng, stage, kind)
            logits = model(tokens).logits[:, :-1]
            wanted = labels[:, 1:]
            mask = wanted != IGNORE
            chosen, wanted = logits[mask], wanted[mask]
            loss = torch.nn.functional.cross_entropy(chosen, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            hits = (chosen.argmax(-1) == wanted)[wanted != VOCABULARY.ids[PERIOD]]
            accuracy[kind] += 0.1 * (hits.float().mean().item() - accuracy[kind])
            step += 1
            bar.set_postfix({k: f"{value:.3f}" for k, value in accuracy.items()}, refresh=False)
            if stage_step >= stage.min_steps and min(accuracy.values()) > TARGET_ACCURACY:
                if stage is not stages[-1]:
                    break
    return step


@torch.inference_mode()
def answered_share(model: PreTrainedModel, num_tokens: int, num_contexts: int, seed: int) -> float:
    """Share of questions answered right (8 per context, asked one by one after the context)."""
    rng = np.random.default_rng(seed)
    right = total = 0
    for _ in range(num_contexts):
        context = make_context(rng, num_tokens)
        keys = rng.choice(list(context.facts), 8).tolist()
        prompts, answers = zip(*(question_prompt(context, key) for key in keys), strict=True)
        picked = model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].argmax(-1)
        right += int((picked == torch.tensor(answers)).sum())
        total += len(keys)
    return right / total


@torch.inference_mode()
def copied_share(model: PreTrainedModel, num_tokens: int, num_prompts: int, seed: int) -> float:
    """Share of 128 greedy tokens that continue the context after ``repeat`` and four tokens."""
    rng = np.random.default_rng(seed)
    pairs = [
        copy_prompt(context, int(rng.integers(num_tokens)))
        for context in (make_context(rng, num_tokens) for _ in range(num_prompts))
    ]
    prompts = torch.tensor([prompt for prompt, _ in pairs])
    wanted = torch.tensor([answer for _, answer in pairs])
    generate: Any = model.generate
    output = generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=wanted.shape[1],
        min_new_tokens=wanted.shape[1],
        do_sample=False,
    )
    return float((output[:, prompts.shape[1] :] == wanted).float().mean())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that maps each blank-separated word to one token and adds none."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY.ids, unk_token=SPECIAL_WORDS[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unk = SPECIAL_WORDS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}",
    )


def save(model: PreTrainedModel, report: dict[str, object], out: Path) -> None:
    """Write model, tokenizer and report as a folder that transformers and vLLM load."""
    model.save_pretrained(out)
    if served_by := VLLM_CLASSES.get(model.config.model_type):
        config = json.loads((out / "config.json").read_text())
        config["architectures"] = [served_by]
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint")
    parser.add_argument("--min-tokens", type=int, default=32, help="begin with this length")
    parser.add_argument("--max-tokens", type=int, default=2048, help="end with this length")
    parser.add_argument(
        "--tasks", nargs="+", choices=EXTRA_TASKS, default=[], help="besides; one may be repeated"
    )
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="llama")
    parser.add_argument("--layer-types", nargs="+", help="kind of each layer, as transformers says")
    parser.add_argument("--window", type=int, default=64, help="tokens a sliding layer looks back")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--max-positions", type=int, default=2048)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = model_to_train(args)
    stages = [s for s in STAGES if args.min_tokens <= s.num_tokens <= args.max_tokens]
    begin = time.perf_counter()
    num_steps = train(model, np.random.default_rng(args.seed), stages, args.tasks)
    seconds = time.perf_counter() - begin
    model.eval()
    report = {
        "seed": args.seed,
        "lengths": [stage.num_tokens for stage in stages],
        "tasks": args.tasks,
        "steps": num_steps,
        "seconds": round(seconds),
        "threads": args.threads,
        "continued_from_seed": json.loads((args.init / "training.json").read_text())["seed"]
        if args.init
        else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "answered": {n: answered_share(model, n, 16, seed=10_000) for n in (256, 512, 1024, 1536)},
        "copied": {n: copied_share(model, n, 8, seed=20_000) for n in (256, 512, 1024, 1536)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    }
    save(model, report, args.out)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
