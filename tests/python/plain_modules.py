"""Modules that nobody but a test has written: no config, no registry, sizes in attributes or nowhere at all."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Classifier(nn.Module):
    """Convolutions, batch norms, pools, a flattened map and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(10, 14, 3, padding=1, bias=False), nn.BatchNorm2d(14), nn.GELU(), nn.AvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(14 * 9, 22), nn.Tanh(), nn.Dropout(0.3), nn.Linear(22, 5)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.features(image))
        return result


class Residual(nn.Module):
    """A block of a residual network: pointwise, depthwise or grouped, pointwise, with squeeze and excitation."""

    def __init__(self, width: int, inner: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.norm2 = nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.reduce(x)))
        y = F.silu(self.norm2(self.mix(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.expand(y)


class ResidualNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Residual(12, 10, 10), Residual(12, 18, 3)])
        self.down = nn.Conv2d(12, 20, 2, stride=2)
        self.short = nn.Conv2d(12, 20, 1, stride=2)
        self.norm = nn.GroupNorm(5, 20)
        self.classify = nn.Linear(20, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(image))
        for block in self.blocks:
            x = block(x)
        x = self.norm(self.down(x) + self.short(x))
        result: torch.Tensor = self.classify(x.mean(dim=(2, 3)))
        return result


class Mixer(nn.Module):
    """An MLP mixer: patches by a convolution, then channels and positions mixed in turn."""

    def __init__(self, patches: int = 9, width: int = 14) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            tokens = nn.Sequential(nn.Linear(patches, 11), nn.GELU(), nn.Linear(11, patches))
            channels = nn.Sequential(nn.Linear(width, 26), nn.GELU(), nn.Linear(26, width))
            self.blocks.append(nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "tokens": tokens, "norm2": nn.LayerNorm(width), "channels": channels,
            }))  # fmt: skip
        self.classify = nn.Linear(width, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block["tokens"](block["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + block["channels"](block["norm2"](x))
        result: torch.Tensor = self.classify(x.mean(1))
        return result


class Attention(nn.Module):
    """Causal attention over a fused projection, taken apart in one of many ways."""

    def __init__(self, form: str, width: int, heads: int) -> None:
        super().__init__()
        self.form, self.n_head, self.head_dim, self.n_embd = form, heads, width // heads, width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads, size = self.n_head, self.head_dim
        qkv = self.qkv(x)
        if self.form == "chunk":
            q, k, v = (part.view(batch, length, heads, size).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        elif self.form == "split":
            parts = qkv.split(self.n_embd, dim=2)
            q, k, v = (part.view(batch, length, heads, width // heads).transpose(1, 2) for part in parts)
        elif self.form == "view":
            q, k, v = qkv.reshape(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        elif self.form == "unflatten":
            q, k, v = qkv.unflatten(-1, (heads, 3, size)).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            q, k, v = torch.einsum("btd,khsd->kbhts", x, self.qkv.weight.view(3, heads, size, width))
        if self.form == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (1.0 / math.sqrt(size))
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bqhd", weights, v)
            result: torch.Tensor = torch.einsum("bqhd,ohd->bqo", y, self.out.weight.view(-1, heads, size))
            return result
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return result


class Gpt(nn.Module):
    """A language model as tutorials write it: learned positions, pre-norm blocks, a head tied to the embedding."""

    def __init__(self, form: str = "chunk", width: int = 24, heads: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(31, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            ffn = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width), nn.Dropout(0.1))
            self.blocks.append(nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "attention": Attention(form, width, heads),
                "norm2": nn.LayerNorm(width), "ffn": ffn,
            }))  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 31, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["ffn"](block["norm2"](x))
        result: torch.Tensor = self.head(self.norm(x))
        return result


class Around(nn.Module):
    """Features -> an inner module -> logits: what the inner module makes of its own axes is all that matters."""

    def __init__(self, inner: nn.Module, width: int, call: Any = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, width), inner, nn.Linear(width, 4)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.first(x))
        y = self.inner(y) if self.call is None else self.call(self.inner, y)
        result: torch.Tensor = self.last(y)
        return result


class Feed(nn.Module):
    """A feed-forward network of plain linear layers."""

    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(x)))
        return result


def features(length: int = 7, width: int = 5) -> tuple[torch.Tensor]:
    """(2, length, width) random features."""
    return (torch.randn(2, length, width, generator=torch.Generator().manual_seed(3)),)


def ids(length: int = 7) -> tuple[torch.Tensor]:
    """(2, length) token ids below 31."""
    return (torch.randint(0, 31, (2, length), generator=torch.Generator().manual_seed(3)),)


def image(side: int = 12) -> tuple[torch.Tensor]:
    """(2, 3, side, side) random pixels."""
    return (torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3)),)
