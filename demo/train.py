"""Train the demo's tokenizer and its small GQA LLaMA, from nothing, on the stories of ``grammar.py``.

    python demo/train.py --steps 4000 --output demo/model      # the shipped model: about half an hour on one CPU thread
    python demo/train.py --quick --output out/quick            # a smoke run: seconds, and a model that only babbles

Everything is seeded; the stories are generated on the fly, so no story is seen twice. The stream the model reads is
``<s> story </s> <s> story </s> ...``; now and then an empty line stands between two stories in place of
``</s> <s>``, so that the model is also at home in a plain text file. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grammar import stories

TRAIN_SEED = 0
TOKENIZER_SEED = 1
CALIBRATION_SEED = 2
EVAL_SEED = 3
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; the defaults are those of the shipped model."""

    steps: int = 4000
    batch: int = 4
    context: int = 512  # tokens a sequence
    peak_rate: float = 4e-3
    warmup: int = 150  # steps
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 256
    plain_every: int = 4  # every so many stories, an empty line ends a story in place of </s> <s>


QUICK = Recipe(
    steps=40, context=64, warmup=5, vocabulary=320, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48
)


def train_tokenizer(recipe: Recipe, n_stories: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``recipe.vocabulary`` entries; ``<s>`` (id 0) is put before every text, as LLaMA has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(stories(TOKENIZER_SEED), n_stories), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised float32 LLaMA with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def token_stream(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """The endless training text as token ids."""
    gap = tokenizer.encode("\n\n", add_special_tokens=False)
    end = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    yield tokenizer.bos_token_id
    for i, text in enumerate(stories(TRAIN_SEED)):
        yield from tokenizer.encode(text, add_special_tokens=False)
        yield from gap if i % recipe.plain_every == recipe.plain_every - 1 else end


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Packed batches, int64 (batch, context)."""
    stream = token_stream(recipe, tokenizer)
    size = recipe.batch * recipe.context
    while True:
        yield torch.tensor(list(islice(stream, size)), dtype=torch.long).view(recipe.batch, recipe.context)


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of ``step``: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Exp of the mean negative log likelihood of a token, each text alone after ``<s>`` (``<s>`` is not predicted)."""
    was_training = model.training
    model.eval()
    nll, n_tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : model.config.max_position_embeddings]
        n = ids.shape[1] - 1
        nll += float(model(input_ids=ids, labels=ids).loss) * n
        n_tokens += n
    model.train(was_training)
    return math.exp(nll / n_tokens)


def train(recipe: Recipe, output: Path, log_every: int = 100) -> dict[str, float]:
    """Train by ``recipe`` and write the model folder ``output``; returns the figures of the run.

    The figures: parameters, first and last training loss (nats a token, the last a mean of up to 100 steps), tokens,
    seconds, held-out perplexity.
    """
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, ids in enumerate(islice(batches(recipe, tokenizer), recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % log_every == 0 or step == recipe.steps - 1:
            recent = losses[-log_every:]
            print(
                f"step {step:5d}  loss {sum(recent) / len(recent):.4f}  "
                f"{(step + 1) * ids.numel() / (time.monotonic() - started):.0f} tokens/s",
                flush=True,
            )
    last = losses[-100:] if recipe.steps > 200 else losses[-5:]
    model.eval()
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "tokens": recipe.steps * recipe.batch * recipe.context,
        "seconds": time.monotonic() - started,
        "perplexity": perplexity(model, tokenizer, list(islice(stories(EVAL_SEED), 100))),
    }
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo model on stories of our own.")
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help=f"training steps (default {Recipe.steps})"
    )
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few steps: a smoke run")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    recipe = QUICK if options.quick else Recipe(steps=options.steps)
    figures = train(recipe, options.output)
    print(json.dumps({"recipe": asdict(recipe), "figures": figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
