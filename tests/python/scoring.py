"""Shared by the scoring tests: tiny models, a graph made by hand, and a naive oracle on whole gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from llmprune.errors import PlanError

IMPORTANCES = ("vector", "element1", "element2", "l1", "l2")
AGGREGATIONS = ("sum", "max", "product", "last")
VOCABULARY = 61


@dataclass(frozen=True, eq=False)
class Member:
    parameter: str
    dim: int
    positions: np.ndarray


@dataclass(eq=False)
class Axis:
    id: int
    size: int
    kind: str
    members: tuple[Member, ...]
    prunable: bool = True

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        return tuple((member.parameter, member.dim) for member in self.members)


@dataclass(eq=False)
class Graph:
    parameters: dict[str, tuple[int, ...]]
    axes: list[Axis] = field(default_factory=list)
    fingerprint: str = "made by hand"

    def around(self, axis: int) -> None:
        raise PlanError(f"axis {axis} lies in nothing")


def whole_graph(model: nn.Module) -> Graph:
    """Every dimension of every parameter as an axis of its own, then axes of several members and positions."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    graph = Graph(shapes)

    def add(size: int, kind: str, members: list[Member]) -> None:
        graph.axes.append(Axis(len(graph.axes), size, kind, tuple(members)))

    by_size: dict[int, list[Member]] = {}
    for name, shape in shapes.items():
        for dim, size in enumerate(shape):
            member = Member(name, dim, np.arange(size)[:, None])
            by_size.setdefault(size, []).append(member)
            add(size, "other", [member])
    rng = np.random.default_rng(5)
    for size, members in by_size.items():
        add(size, "channel", members)
        if size % 4 == 0:  # four positions an index, scattered, and a buffer that carries no score
            split = [Member(m.parameter, m.dim, rng.permutation(size).reshape(size // 4, 4)) for m in members]
            add(size // 4, "head", [*split, Member("some.buffer", 0, np.arange(size // 4)[:, None])])
    return graph


def model_of(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "eager", experts: str = "batched_mm"
) -> nn.Module:
    """A tiny model with every parameter random, so that no gradient vanishes by symmetry."""
    base = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
    llama = {
        **base, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28,
        "eos_token_id": 2,
    }  # fmt: skip
    configs = {
        "llama_mha": lambda: transformers.LlamaConfig(**llama, num_key_value_heads=4),
        "llama_gqa": lambda: transformers.LlamaConfig(**llama, num_key_value_heads=2),
        "llama_tied": lambda: transformers.LlamaConfig(
            **llama, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "qwen2": lambda: transformers.Qwen2Config(**llama, num_key_value_heads=2),
        "qwen3": lambda: transformers.Qwen3Config(**llama, num_key_value_heads=2, head_dim=4),
        "gemma": lambda: transformers.GemmaConfig(**llama, num_key_value_heads=1, head_dim=4),
        "gemma2": lambda: transformers.Gemma2Config(**llama, num_key_value_heads=1, head_dim=4),
        "cohere": lambda: transformers.CohereConfig(**llama, num_key_value_heads=2),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, n_inner=28
        ),
        "opt": lambda: transformers.OPTConfig(
            **base,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=28,
        ),
        "phi": lambda: transformers.PhiConfig(**llama, num_key_value_heads=4, partial_rotary_factor=0.5),
        "mixtral": lambda: transformers.MixtralConfig(
            **llama, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
        ),
        "mamba": lambda: transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=3, num_hidden_layers=2, time_step_rank=2
        ),
    }
    config = configs[name]()
    config._attn_implementation = attention
    config._experts_implementation = experts
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.mul_(0.5).add_(0.15 * noise)
    return model


def ids_of(samples: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(6))


def plain_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Each sample's loss as transformers' own takes it: in float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.stack([F.cross_entropy(row, one[1:]) for row, one in zip(logits, ids, strict=True)])


def gradients(model: nn.Module, ids: torch.Tensor, losses=plain_losses) -> dict[str, list[torch.Tensor]]:
    """Per parameter the gradients of each sample's loss, one backward pass a sample."""
    named = dict(model.named_parameters())
    out: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for row in ids:
        grads = torch.autograd.grad(losses(model, row[None]).sum(), list(named.values()), allow_unused=True)
        for (name, parameter), grad in zip(named.items(), grads, strict=True):
            out[name].append(torch.zeros_like(parameter) if grad is None else grad)
    return out


def _structure(importance: str, w: np.ndarray, g: np.ndarray, s: np.ndarray) -> float:
    if importance == "vector":
        return abs((g * w).sum())
    if importance == "element1":
        return np.abs(g * w).sum()
    if importance == "element2":
        return np.abs(g * w - w * s * w / 2).sum()
    return np.abs(w).sum() if importance == "l1" else np.sqrt((w**2).sum())


def oracle(
    model: nn.Module,
    graph: Graph,
    per_sample: dict[str, list[torch.Tensor]],
    importance: str,
    aggregation: str,
) -> dict[int, np.ndarray]:
    """The definitions, read slowly: structure by structure, member by member."""
    structures: dict[tuple[str, int], np.ndarray] = {}
    for name, parameter in model.named_parameters():
        w = parameter.detach().double().numpy()
        each = np.stack([g.double().numpy() for g in per_sample[name]])
        g, s = each.mean(0), (each**2).mean(0)
        for dim in range(w.ndim):
            values = [
                _structure(importance, *(np.take(t, index, dim) for t in (w, g, s)))
                for index in range(w.shape[dim])
            ]
            structures[name, dim] = np.array(values)
    out = {}
    for axis in graph.axes:
        group = []
        for index in range(axis.size):
            members = [
                sum(structures[m.parameter, m.dim][p] for p in m.positions[index])
                for m in axis.members
                if (m.parameter, m.dim) in structures
            ]
            every = {
                "sum": sum(members),
                "max": max(members),
                "product": np.prod(members),
                "last": members[-1],
            }
            group.append(every[aggregation])
        out[axis.id] = np.array(group, dtype=np.float64)
    return out


def worst(got, want) -> float:
    """Greatest deviation over axes, relative to each axis's greatest score.

    Where a gradient is zero but for rounding (a key projection's bias moves every score of a softmax alike), rounding
    is all there is to compare: 1e-9 of the greatest score of any axis counts as zero.
    """
    floor = 1e-9 * max(float(np.abs(w).max()) for w in want.values()) + 1e-300
    return max(float(np.abs(got[a] - w).max() / (np.abs(w).max() + floor)) for a, w in want.items())
