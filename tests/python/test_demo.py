"""The shipped demo: its stories, its texts, its tokenizer, and a model that is good and has no capacity to spare."""

from __future__ import annotations

import hashlib
import json
import math
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

import grammar
import plots
import train

DEMO = Path(train.__file__).parent
N_CALIBRATION, N_EVAL = 90, 120  # stories in the committed texts
PERPLEXITY_BOUND = 1.42  # a token; the model card says 1.37


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[LlamaForCausalLM, PreTrainedTokenizerFast]]:
    """The shipped model and tokenizer, loaded while no socket can be opened."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("loading the demo opened a socket")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model, tokenizer
    torch.set_num_threads(threads)


def some_stories(n: int, seed: int = 0) -> list[str]:
    return list(islice(grammar.stories(seed), n))


# --- the generator --------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_stories_everywhere() -> None:
    text = "\n".join(some_stories(500))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "19c78798f312b29161d671fb7e54b66d3efcf908361b2cd9d6448f6d4653912c"
    )


def test_a_story_depends_on_its_seed_and_number_alone() -> None:
    assert [grammar.story(5, i) for i in (7, 3)] == [some_stories(8, seed=5)[i] for i in (7, 3)]
    assert list(islice(grammar.stories(5, first=3), 2)) == some_stories(5, seed=5)[3:]
    assert not set(some_stories(200, seed=0)) & set(some_stories(200, seed=1))


@pytest.mark.parametrize(
    ("name", "seed", "n"),
    [("calibration.txt", train.CALIBRATION_SEED, N_CALIBRATION), ("eval.txt", train.EVAL_SEED, N_EVAL)],
)
def test_committed_texts_are_what_the_generator_gives(name: str, seed: int, n: int) -> None:
    command = [sys.executable, str(DEMO / "grammar.py"), "--seed", str(seed), "--stories", str(n)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == (DEMO / name).read_bytes()


def test_generator_refuses_a_negative_seed() -> None:
    command = [sys.executable, str(DEMO / "grammar.py"), "--seed", "-1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "must not be negative" in result.stderr


def test_stories_are_distinct_and_use_every_plot() -> None:
    assert len(set(some_stories(5000))) == 5000
    told = {t_plot.__name__ for t_plot in map(plot_of, range(300))}
    assert told == {plot.__name__ for plot in plots.SKELETONS}


def plot_of(index: int) -> Callable[[grammar.Teller], list[str]]:
    """The plot of story ``index`` of seed 0."""
    chosen: list[Callable[[grammar.Teller], list[str]]] = []

    class Spy(grammar.Teller):
        def pick(self, items):  # type: ignore[no-untyped-def]
            item = super().pick(items)
            if items is plots.SKELETONS:
                chosen.append(item)
            return item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "Teller", Spy)
        grammar.story(0, index)
    (plot,) = chosen
    return plot


def test_stories_are_correct_english_in_form() -> None:
    for text in some_stories(3000):
        assert text == text.strip()
        assert "  " not in text
        assert "\n" not in text
        assert text[0].isupper()
        assert text[-1] in '.!?"'
        assert text.count('"') % 2 == 0, text
        for article, letter in re.findall(r"\b([Aa]n?) (?!hour)(\w)", text):
            assert (article.lower() == "an") == (letter.lower() in "aeiou"), text
        assert not re.search(r"\. [a-z]|[a-z]\.[A-Za-z]", text), text
        assert 80 <= len(text.split()) <= 200


def test_numbers_in_the_stories_add_up() -> None:
    value = {word: n for n, word in enumerate(grammar.NUMBERS)}
    pattern = re.compile(r"(\w+) and (\w+)(?: made|, that makes) (\w+)")
    sums = [match.groups() for text in some_stories(3000) for match in pattern.finditer(text)]
    assert len(sums) > 100
    for a, b, total in sums:
        assert value[a.lower()] + value[b] == value[total]


def test_the_lost_thing_comes_back_in_its_colour() -> None:
    rng = grammar.random.Random(0)
    for _ in range(200):
        text = " ".join(plots.lost_and_found(grammar.Teller(rng)))
        words = re.findall(r"[a-z]+", text)
        assert len({word for word in words if word in plots.COLOURS}) == 1, text


# --- the model ------------------------------------------------------------------------------------------------------


def test_model_is_a_small_grouped_query_llama(demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = demo
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert config.num_key_value_heads < config.num_attention_heads
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert 2**21 <= (DEMO / "model" / "model.safetensors").stat().st_size <= 2**22
    assert config.vocab_size == len(tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tokenizer_round_trips_the_texts(demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = demo
    for name in ("calibration.txt", "eval.txt"):
        text = (DEMO / name).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer)
        assert len(ids) < len(text) / 3
    odd = "Żółw, naïve 𝄞 \t\x00 end"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False).input_ids) == odd
    assert tokenizer("Once").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1


def test_shipped_model_knows_its_stories(demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = demo
    held_out = (DEMO / "eval.txt").read_text(encoding="utf-8").split("\n\n")[:40]
    assert train.perplexity(model, tokenizer, held_out) < PERPLEXITY_BOUND


def test_shipped_model_is_at_home_in_a_plain_text_file(
    demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = demo
    ids = tokenizer((DEMO / "eval.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = ids[0, : 16 * 256].view(16, 256)
    with torch.no_grad():
        assert math.exp(float(model(input_ids=windows, labels=windows).loss)) < PERPLEXITY_BOUND * 1.25


def test_model_writes_a_whole_story(demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = demo
    prompt = tokenizer("Once there was", return_tensors="pt").input_ids
    out = model.generate(prompt, max_new_tokens=300, do_sample=False, pad_token_id=1)[0]
    text = tokenizer.decode(out, skip_special_tokens=True).split("\n\n")[0]
    known = set(re.findall(r"[A-Za-z']+", " ".join(some_stories(3000))))
    words = re.findall(r"[A-Za-z']+", text)
    assert 80 <= len(words) <= 220
    assert set(words) <= known
    name = re.search(r"(?:named|called|name was) ([A-Z]\w+)", text)
    assert name is not None
    assert text.count(name[1]) >= 3, text


def without_channels(
    model: LlamaForCausalLM, share: float, rank: Callable[[torch.nn.Module], torch.Tensor]
) -> Callable[[], None]:
    """Zero ``share`` of the FFN channels of every layer, those of lowest ``rank``; returns what undoes it."""
    saved = []
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        scores = rank(layer.mlp)
        lowest = scores.argsort()[: int(share * scores.numel())]
        saved.append((weight, weight.detach().clone()))
        with torch.no_grad():
            weight[:, lowest] = 0

    def undo() -> None:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)

    return undo


def test_pruning_hurts_and_importance_knows_where(
    demo: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    """A fifth of the channels at random costs much; the fifth with least |gradient times weight| costs far less."""
    model, tokenizer = demo
    held_out = some_stories(15, train.EVAL_SEED)
    for text in some_stories(15, train.CALIBRATION_SEED):
        ids = tokenizer(text, return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
    generator = torch.Generator().manual_seed(0)

    def element1(mlp: torch.nn.Module) -> torch.Tensor:
        rows = sum((p.weight * p.weight.grad).abs().sum(1) for p in (mlp.gate_proj, mlp.up_proj))
        return (rows + (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs().sum(0)).detach()

    def at_random(mlp: torch.nn.Module) -> torch.Tensor:
        return torch.rand(mlp.gate_proj.out_features, generator=generator)

    whole = train.perplexity(model, tokenizer, held_out)
    pruned = {}
    for rank in (element1, at_random):
        undo = without_channels(model, 0.2, rank)
        pruned[rank.__name__] = train.perplexity(model, tokenizer, held_out)
        undo()
    model.zero_grad(set_to_none=True)
    assert train.perplexity(model, tokenizer, held_out) == whole
    assert pruned["at_random"] > 1.3 * whole
    assert pruned["element1"] - whole < 0.5 * (pruned["at_random"] - whole)


# --- the training script --------------------------------------------------------------------------------------------


def test_quick_training_lowers_the_loss_and_saves_a_model(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "train.py"), "--quick", "--output", str(tmp_path / "model")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    figures = report["figures"]
    assert figures["last_loss"] < figures["first_loss"] - 0.5
    assert figures["perplexity"] < math.exp(figures["first_loss"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    again = train.perplexity(model.eval(), tokenizer, some_stories(100, train.EVAL_SEED))
    assert again == pytest.approx(figures["perplexity"], rel=1e-4)


def test_training_is_the_same_for_a_seed(tmp_path: Path) -> None:
    recipe = train.Recipe(
        steps=4,
        batch=2,
        context=32,
        warmup=1,
        vocabulary=300,
        hidden=16,
        layers=1,
        heads=2,
        kv_heads=1,
        ffn=24,
    )
    first, second = (train.train(recipe, tmp_path / name) for name in ("a", "b"))
    assert first["last_loss"] == second["last_loss"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
