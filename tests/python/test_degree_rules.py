"""The axes against a literal reading of LLM-Pruner's dependency rules (Ma et al. 2023, section 3.1) on single neurons.

With In(N) and Out(N) the neurons that feed N and that N feeds, and Deg-(N), Deg+(N) how many they are:

- forward: N_j in Out(N_i) and Deg-(N_j) = 1 make N_j depend on N_i;
- backward: N_i in In(N_j) and Deg+(N_i) = 1 make N_i depend on N_j;
- trigger and traverse: a neuron, all that depend on it, all that depend on those, until nothing is added.

The rules are directed. In a gate, m = a * b, the factors (each read by the product alone) depend on m, but m, with two
inputs, on neither: the closure of m is the whole group, that of a only what comes before it. So a group is a *maximal*
closure, and every closure lies in one.

What the rules describe by themselves, and what the random networks here are made of: dense layers of two neurons or
more, each neuron between them read by one element-wise operation or by dense layers (one or several), gates of two
dense layers, concatenations, per-channel scales and shifts, depthwise convolutions. What they do not, though a model's
groups must have it, and which is therefore left out: a residual stream (its neurons are read by a dense layer and by an
addition, so neither rule applies); a neuron read by two element-wise operations; grouped convolutions, whose groups
must stay of one size because a tensor is rectangular. tests/core/test_rules.c has these.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import llmprune

Neuron = tuple[int, int]
Slice = tuple[str, int, int]

FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
ELEMENTWISE = (*FUNCTIONS, "scale", "shift", "depthwise")


@dataclass(frozen=True)
class Branch:
    """A dense layer and the element-wise operations behind it."""

    width: int
    bias: bool
    chain: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One or two branches of one input, joined by a product or a concatenation, and what follows."""

    branches: tuple[Branch, ...]
    join: str
    chain: tuple[str, ...]


chains = st.lists(st.sampled_from(ELEMENTWISE), max_size=3).map(tuple)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    join = draw(st.sampled_from(["none", "product", "cat"]))
    width = draw(st.integers(2, 5))
    branches = []
    for _ in range(1 if join == "none" else 2):
        branches.append(Branch(width, draw(st.booleans()), draw(chains)))
        width = width if join == "product" else draw(st.integers(2, 5))
    return Layer(tuple(branches), join, draw(chains))


class Depthwise(nn.Module):
    """(batch, channels) through a convolution of kernel 1 with a group for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.unsqueeze(-1)).squeeze(-1)


class Network(nn.Module):
    """The layers between three inputs and three outputs, and nothing known about neurons."""

    def __init__(self, specification: list[Layer]) -> None:
        super().__init__()
        self.specification = specification
        self.parts = nn.ModuleDict()
        self.gains = nn.ParameterDict()
        width = 3
        for number, layer in enumerate(specification):
            for b, branch in enumerate(layer.branches):
                self.parts[f"dense{number}_{b}"] = nn.Linear(width, branch.width, bias=branch.bias)
                self._add_chain(f"{number}_{b}", branch.chain, branch.width)
            widths = [branch.width for branch in layer.branches]
            width = sum(widths) if layer.join == "cat" else widths[0]
            self._add_chain(f"{number}", layer.chain, width)
        self.parts["last"] = nn.Linear(width, 3)

    def _add_chain(self, name: str, chain: tuple[str, ...], width: int) -> None:
        for place, kind in enumerate(chain):
            if kind == "depthwise":
                self.parts[f"{kind}{name}_{place}"] = Depthwise(width)
            elif kind in ("scale", "shift"):
                self.gains[f"{kind}{name}_{place}"] = nn.Parameter(torch.randn(width))

    def _run_chain(self, name: str, chain: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        for place, kind in enumerate(chain):
            key = f"{kind}{name}_{place}"
            if kind == "depthwise":
                x = self.parts[key](x)
            elif kind == "scale":
                x = x * self.gains[key]
            elif kind == "shift":
                x = x + self.gains[key]
            else:
                x = FUNCTIONS[kind](x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.specification):
            outputs = [
                self._run_chain(f"{number}_{b}", branch.chain, self.parts[f"dense{number}_{b}"](x))
                for b, branch in enumerate(layer.branches)
            ]
            x = outputs[0]
            if layer.join == "product":
                x = outputs[0] * outputs[1]
            elif layer.join == "cat":
                x = torch.cat(outputs, dim=-1)
            x = self._run_chain(str(number), layer.chain, x)
        return self.parts["last"](x)


@dataclass
class Neurons:
    """The network neuron by neuron: who feeds whom, and which slices of which parameters belong to whom."""

    out: dict[Neuron, set[Neuron]] = field(default_factory=lambda: defaultdict(set))
    into: dict[Neuron, set[Neuron]] = field(default_factory=lambda: defaultdict(set))
    slices: dict[Neuron, set[Slice]] = field(default_factory=lambda: defaultdict(set))
    stage: int = 0

    def make(self, width: int) -> list[Neuron]:
        self.stage += 1
        return [(self.stage, channel) for channel in range(width)]

    def connect(self, source: Neuron, target: Neuron) -> None:
        self.out[source].add(target)
        self.into[target].add(source)

    def follow(self, sources: list[Neuron], *others: list[Neuron]) -> list[Neuron]:
        """Element by element: neuron c of the result reads neuron c of each source."""
        made = self.make(len(sources))
        for column in (sources, *others):
            for source, target in zip(column, made, strict=True):
                self.connect(source, target)
        return made

    def dense(self, name: str, sources: list[Neuron], width: int, bias: bool) -> list[Neuron]:
        made = self.make(width)
        for row, target in enumerate(made):
            self.slices[target].add((f"{name}.weight", 0, row))
            if bias:
                self.slices[target].add((f"{name}.bias", 0, row))
            for column, source in enumerate(sources):
                self.connect(source, target)
                self.slices[source].add((f"{name}.weight", 1, column))
        return made

    def chain(self, name: str, kinds: tuple[str, ...], sources: list[Neuron]) -> list[Neuron]:
        for place, kind in enumerate(kinds):
            sources = self.follow(sources)
            key = f"{kind}{name}_{place}"
            names = {
                "depthwise": [f"parts.{key}.conv.weight", f"parts.{key}.conv.bias"],
                "scale": [f"gains.{key}"],
                "shift": [f"gains.{key}"],
            }.get(kind, [])
            for channel, neuron in enumerate(sources):
                self.slices[neuron] |= {(parameter, 0, channel) for parameter in names}
        return sources

    def dependents(self, neuron: Neuron) -> set[Neuron]:
        """What depends on a neuron, by the two rules as they are written."""
        forward = {other for other in self.out[neuron] if len(self.into[other]) == 1}
        backward = {other for other in self.into[neuron] if len(self.out[other]) == 1}
        return forward | backward

    def closure(self, trigger: Neuron) -> frozenset[Neuron]:
        group, pending = {trigger}, [trigger]
        while pending:
            added = self.dependents(pending.pop()) - group
            group |= added
            pending += added
        return frozenset(group)


def neurons_of(specification: list[Layer]) -> tuple[Neurons, set[Neuron]]:
    """The neuron graph, and the network's inputs and outputs."""
    graph = Neurons()
    x = inputs = graph.make(3)
    for number, layer in enumerate(specification):
        outputs = [
            graph.chain(
                f"{number}_{b}",
                branch.chain,
                graph.dense(f"parts.dense{number}_{b}", x, branch.width, branch.bias),
            )
            for b, branch in enumerate(layer.branches)
        ]
        x = outputs[0]
        if layer.join == "product":
            x = graph.follow(*outputs)
        elif layer.join == "cat":
            x = graph.follow(outputs[0] + outputs[1])
        x = graph.chain(str(number), layer.chain, x)
    return graph, {*inputs, *graph.dense("parts.last", x, 3, True)}


def groups_by_the_rules(specification: list[Layer]) -> tuple[set[frozenset[Slice]], list[frozenset[Slice]]]:
    """Maximal closures as sets of slices, without those that reach an input or output; and every closure."""
    graph, ends = neurons_of(specification)
    closures = {graph.closure(neuron) for neuron in {*graph.out, *graph.into}}
    maximal = [one for one in closures if not any(one < other for other in closures)]
    inside = [one for one in maximal if not one & ends]

    def slices(neurons: frozenset[Neuron]) -> frozenset[Slice]:
        return frozenset().union(*(graph.slices[neuron] for neuron in neurons))

    return {slices(one) for one in inside}, [slices(one) for one in closures if not one & ends]


def groups_by_the_axes(network: Network) -> set[frozenset[Slice]]:
    graph = llmprune.trace(network, {"x": torch.ones(2, 3)})
    return {
        frozenset(
            (member.parameter, member.dim, int(position))
            for member in axis.members
            for position in member.positions[index]
        )
        for axis in graph.axes
        if axis.prunable
        for index in range(axis.size)
    }


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(layers(), min_size=1, max_size=4))
def test_axis_indices_are_the_maximal_closures_of_the_degree_rules(specification: list[Layer]) -> None:
    groups, closures = groups_by_the_rules(specification)
    found = groups_by_the_axes(Network(specification))
    assert found == groups
    assert sum(len(layer.branches) if layer.join == "cat" else 1 for layer in specification) <= len(found)
    for closure in closures:
        assert any(closure <= group for group in found), "a closure across two groups"


def test_a_gate_is_reached_from_its_product_only() -> None:
    """The rules are directed: removing the product takes both factors, a factor alone takes what is behind it."""
    branch = Branch(2, False, ("relu",))
    graph, _ = neurons_of([Layer((branch, branch), "product", ())])
    products = [neuron for neuron in graph.into if len(graph.into[neuron]) == 2]
    product = next(neuron for neuron in products if len(graph.slices[neuron]) == 1)
    factors = graph.into[product]
    assert all(factor in graph.closure(product) for factor in factors)
    for factor in factors:
        assert product not in graph.closure(factor)
        assert graph.closure(factor) < graph.closure(product)
    assert len(graph.closure(product)) == 5, "the product, two activations, two outputs of dense layers"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(x + self.block(x))


def test_a_residual_stream_is_beyond_the_rules_and_within_the_axes() -> None:
    """Neither rule joins a stream's neuron to the sum (it is read five times; the sum reads two); the axes must."""
    graph = Neurons()
    stream = graph.dense("embed", graph.make(3), 4, True)
    total = graph.follow(stream, graph.dense("block", stream, 4, True))
    graph.dense("head", total, 3, True)
    assert total[0] not in graph.closure(stream[0])
    assert stream[0] not in graph.closure(total[0])
    (axis,) = [a for a in llmprune.trace(Residual(), {"x": torch.ones(2, 3)}).axes if a.prunable]
    assert axis.size == 4
    assert {(m.parameter, m.dim) for m in axis.members} == {
        ("embed.weight", 0), ("embed.bias", 0), ("block.weight", 0), ("block.bias", 0), ("block.weight", 1),
        ("head.weight", 1),
    }  # fmt: skip
