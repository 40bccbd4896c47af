"""Small networks drawn at random from what people build: every prunable axis of each comes out whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zeroed_reference import check_axes, seeded

LENGTH = 7


@dataclass(frozen=True)
class Block:
    """One block: what mixes positions, what mixes channels, and how they are joined."""

    heads: int  # key-value heads; 0: no attention
    group: int  # query heads for each
    size: int  # width of a head
    fused: bool  # one projection for queries, keys and values
    einsum: bool  # attention written out, or the framework's
    ffn: str  # gated, fused (gate and up in one), plain or none
    inner: int
    norm: str  # layer, rms, torch-rms or none
    before: bool  # norm before or after
    parallel: bool  # attention and FFN read the same input
    residual: bool


@dataclass(frozen=True)
class Network:
    stem: str  # embedding, linear, conv or depthwise
    width: int
    blocks: tuple[Block, ...]
    tied: bool
    bias: bool


def blocks() -> st.SearchStrategy[Block]:
    return st.builds(
        Block,
        heads=st.integers(0, 3),
        group=st.integers(1, 3),
        size=st.sampled_from([3, 4]),
        fused=st.booleans(),
        einsum=st.booleans(),
        ffn=st.sampled_from(["gated", "fused", "plain", "none"]),
        inner=st.sampled_from([9, 11]),
        norm=st.sampled_from(["layer", "rms", "torch-rms", "none"]),
        before=st.booleans(),
        parallel=st.booleans(),
        residual=st.booleans(),
    )


def networks() -> st.SearchStrategy[Network]:
    return st.builds(
        Network,
        stem=st.sampled_from(["embedding", "linear", "conv", "depthwise"]),
        width=st.sampled_from([8, 10]),
        blocks=st.lists(blocks(), min_size=1, max_size=2).map(tuple),
        tied=st.booleans(),
        bias=st.booleans(),
    )


class RootMeanSquare(nn.Module):
    """RMSNorm as most models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm(kind: str, width: int) -> nn.Module:
    makers: dict[str, Any] = {"layer": nn.LayerNorm, "rms": RootMeanSquare, "torch-rms": nn.RMSNorm}
    made: nn.Module = makers[kind](width) if kind in makers else nn.Identity()
    return made


class Attention(nn.Module):
    def __init__(self, b: Block, width: int, bias: bool) -> None:
        super().__init__()
        self.einsum, self.num_kv, self.num_heads, self.head_dim = b.einsum, b.heads, b.heads * b.group, b.size
        sizes = [self.num_heads * b.size, b.heads * b.size, b.heads * b.size]
        if b.fused:
            self.qkv = nn.Linear(width, sum(sizes), bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n, bias) for n in sizes)
        self.o = nn.Linear(sizes[0], width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        if hasattr(self, "qkv"):
            own, shared = self.num_heads * self.head_dim, self.num_kv * self.head_dim
            q, k, v = self.qkv(x).split([own, shared, shared], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.num_kv, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, self.num_kv, self.head_dim).transpose(1, 2)
        if self.einsum:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv, dim=1) for t in (k, v))
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.4).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bqhd", weights, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True).transpose(
                1, 2
            )
        result: torch.Tensor = self.o(y.reshape(batch, length, -1))
        return result


class FeedForward(nn.Module):
    def __init__(self, b: Block, width: int, bias: bool) -> None:
        super().__init__()
        self.kind = b.ffn
        self.up = nn.Linear(width, 2 * b.inner if b.ffn == "fused" else b.inner, bias)
        if b.ffn == "gated":
            self.gate = nn.Linear(width, b.inner, bias)
        self.down = nn.Linear(b.inner, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.kind == "gated":
            y = F.silu(self.gate(x)) * y
        elif self.kind == "fused":
            gate, y = y.chunk(2, dim=-1)
            y = F.gelu(gate) * y
        else:
            y = F.relu(y)
        result: torch.Tensor = self.down(y)
        return result


class Layer(nn.Module):
    def __init__(self, b: Block, width: int, bias: bool) -> None:
        super().__init__()
        self.b = (b.before, b.parallel, b.residual)
        self.parts = nn.ModuleList()
        if b.heads:
            self.parts.append(Attention(b, width, bias))
        if b.ffn != "none":
            self.parts.append(FeedForward(b, width, bias))
        self.norms = nn.ModuleList(norm(b.norm, width) for _ in self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, parallel, residual = self.b
        start = x
        for part, normalise in zip(self.parts, self.norms, strict=True):
            read = start if parallel else x
            y = part(normalise(read)) if before else part(read)
            x = x + y if residual or parallel else y
            x = x if before else normalise(x)
        return x


class Net(nn.Module):
    def __init__(self, n: Network) -> None:
        super().__init__()
        if n.stem == "embedding":
            self.stem: nn.Module = nn.Embedding(13, n.width)
        elif n.stem == "linear":
            self.stem = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, n.width))
        else:
            groups = 6 if n.stem == "depthwise" else 1
            self.stem = nn.Sequential(
                nn.Conv1d(5, 6, 3, padding=1), nn.GELU(), nn.Conv1d(6, 6, 3, padding=1, groups=groups),
                nn.BatchNorm1d(6), nn.Conv1d(6, n.width, 1),
            )  # fmt: skip
        self.convolves = n.stem in ("conv", "depthwise")
        self.layers = nn.ModuleList(Layer(b, n.width, n.bias) for b in n.blocks)
        self.head = nn.Linear(n.width, 13, n.bias)
        if n.tied and isinstance(self.stem, nn.Embedding):
            self.head.weight = self.stem.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2) if self.convolves else self.stem(x)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(network=networks(), seed=st.integers(0, 1000))
def test_every_prunable_axis_of_a_random_network_comes_out_whole(network: Network, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if network.stem == "embedding":
        x = torch.randint(0, 13, (2, LENGTH), generator=generator)
    else:
        x = torch.randn(2, LENGTH, 5, generator=generator)
    graph = check_axes(seeded(Net, network), (x,), seed)
    assert graph.unknown_operations == {}
    kinds = {axis.kind for axis in graph.axes if axis.prunable}
    if any(block.ffn != "none" for block in network.blocks):
        assert "ffn" in kinds
    if any(block.heads > 1 for block in network.blocks):
        assert "head" in kinds
