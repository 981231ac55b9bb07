"""Random valid programs: hypothesis grows them forward from typed inputs.

A pool holds the values computed so far with an example of each; every step draws an operator or a
motif (what passes look for: conv-bn-relu, attention, gated feed-forward, tied tables ...) that
accepts something in the pool and solves its free sizes by construction. A program takes rows
(batch, time, width), an image (batch, channels, height, width) or tokens (batch, time).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.case import Sample
from tests.tiny import Attention, RmsNorm, normal, sample

# Sizes that break tails, groups and alignments: one, odd, prime, a power of two and its neighbours.
WIDTHS = (1, 3, 4, 7, 8, 12, 16, 17)
TIMES = (1, 2, 5, 8)
LIMIT = 1e3  # larger values are squashed, so that rounding stays small against the outputs


class Generated(nn.Module):
    """A module that runs recorded steps; ``parts`` and ``w0``, ``w1`` ... are its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.steps: list[Callable[[Generated, list[Tensor]], Tensor]] = []
        self.outputs: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The chosen values of the pool, in the order they were chosen."""
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        return tuple(values[index] for index in self.outputs)


@dataclass
class Pool:
    """The values so far, each with an example, and the module that computes them."""

    draw: Callable[[Any], Any]
    module: Generated
    examples: list[Tensor]

    def add(self, step: Callable[[Generated, list[Tensor]], Any]) -> int:
        """Record a step and run it on the examples; the index of its value."""
        value = self._run(step)
        if value.is_floating_point() and value.numel() and float(value.abs().max()) > LIMIT:
            inner = step

            def step(m: Generated, values: list[Tensor]) -> Tensor:
                return torch.tanh(inner(m, values) * 1e-3)

            value = self._run(step)
        self.module.steps.append(step)
        self.examples.append(value)
        return len(self.examples) - 1

    def _run(self, step: Callable[[Generated, list[Tensor]], Any]) -> Tensor:
        with torch.no_grad():
            return step(self.module, self.examples)

    def part(self, make: Callable[[], nn.Module]) -> str:
        """A new part of the module, with weights that depend on nothing but its position."""
        name = f"p{len(self.module.parts)}"
        self.module.parts[name] = sample(make(), seed=len(self.module.parts)).module.eval()
        return name

    def weight(self, *shape: int) -> str:
        """A new weight of the module itself."""
        name = f"w{len(list(self.module.parameters(recurse=False)))}"
        tensor = normal(*shape, seed=len(self.examples)) * 0.3 + 1
        self.module.register_parameter(name, nn.Parameter(tensor))
        return name

    def apply(self, source: int, function: Callable[[Tensor], Any]) -> int:
        """A step that computes from one value, or looks at it in another shape."""
        return self.add(lambda m, v: function(v[source]))

    def call(self, name: str, source: int) -> int:
        """A step that runs a part on a value."""
        return self.add(lambda m, v: m.parts[name](v[source]))

    def choose(self, accept: Callable[[Tensor], bool]) -> int | None:
        """One of the accepted values, later ones more often; None if there is none."""
        found = [i for i, example in enumerate(self.examples) if accept(example)]
        if not found:
            return None
        return self.draw(st.one_of(st.just(found[-1]), st.sampled_from(found)))


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point()


def _is_rows(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() == 3


def _is_image(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() == 4 and x.shape[-1] > 1 and x.shape[-2] > 1


def _is_tokens(x: Tensor) -> bool:
    return x.dtype == torch.int64 and x.dim() == 2


def _varies(x: Tensor) -> bool:
    """Rows a normalisation can divide by their deviation without blowing rounding up."""
    return _is_rows(x) and x.shape[-1] > 2 and bool((x.std(-1) > 0.05).all())


# ---- single operators


def unary(pool: Pool, x: int) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sin": torch.sin,
        "abs": torch.abs, "sigmoid": torch.sigmoid, "neg": torch.neg,
        "dropout": lambda v: F.dropout(v, 0.1, training=False),
        "softmax": lambda v: F.softmax(v, -1),
        "mean": lambda v: v.mean(-1, keepdim=True),
    }  # fmt: skip
    name = pool.draw(st.sampled_from(sorted(functions)))
    pool.apply(x, functions[name])


def scalar(pool: Pool, x: int) -> None:
    value = pool.draw(st.sampled_from([1, 1.0, 0, -0.0, 0.5, -2, 3.0, 0.125]))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mul": lambda v: v * value, "add": lambda v: v + value, "sub": lambda v: v - value,
        "rsub": lambda v: value - v, "div": lambda v: v / (value or 2),
    }  # fmt: skip
    name = pool.draw(st.sampled_from(sorted(functions)))
    pool.apply(x, functions[name])


def channel_constant(pool: Pool, x: int) -> None:
    example = pool.examples[x]
    axis = -1 if example.dim() < 4 else 1
    shape = (example.shape[axis],) if axis == -1 else (example.shape[1], 1, 1)
    name = pool.weight(*shape)
    if pool.draw(st.booleans()):
        pool.add(lambda m, v: v[x] * getattr(m, name))
    else:
        pool.add(lambda m, v: getattr(m, name) + v[x])


def computed_constant(pool: Pool, x: int) -> None:
    """Adds what depends on weights, or on nothing at all."""
    width = pool.examples[x].shape[-1]
    first, second = pool.weight(width), pool.weight(1)
    steps: dict[str, Callable[[Generated, list[Tensor]], Tensor]] = {
        "weights": lambda m, v: v[x] + getattr(m, first).sin() * getattr(m, second),
        "positions": lambda m, v: v[x] + torch.arange(width) * 0.1,
        "mask": lambda m, v: v[x].masked_fill(torch.ones(width).cumsum(0) > width - 0.5, 0.25),
        "view": lambda m, v: v[x] * getattr(m, first).view(1, -1).expand(1, width)[0],
    }
    name = pool.draw(st.sampled_from(sorted(steps)))
    pool.add(steps[name])


def view(pool: Pool, x: int) -> None:
    example = pool.examples[x]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda v: v.contiguous(),
        "clone": lambda v: v.clone(),
        "same shape": lambda v: v.reshape(-1, *example.shape[1:]),
        "to float": lambda v: v.to(v.dtype),
        "through double": lambda v: v.double().to(v.dtype),
        "whole slice": lambda v: v[..., : example.shape[-1]],
        "unsqueeze": lambda v: v.unsqueeze(1).squeeze(1) if example.shape[1] != 1 else v[:],
        "no padding": lambda v: F.pad(v, (0, 0)),
        "expand": lambda v: v.expand(-1, *example.shape[1:]),
        "detach": lambda v: v.detach(),
        "there and back": lambda v: v.transpose(1, -1).transpose(-1, 1),
    }
    if example.dim() == 3:
        functions["transpose"] = lambda v: v.transpose(1, 2)
        functions["flat and back"] = lambda v: v.flatten(1).unflatten(1, example.shape[1:])
        functions["split heads"] = lambda v: v.unflatten(2, (-1, 1)).flatten(2)
    if example.shape[-1] > 1:
        functions["cut"] = lambda v: v[..., 1:]
        functions["half"] = lambda v: v.chunk(2, -1)[0]
    name = pool.draw(st.sampled_from(sorted(functions)))
    pool.apply(x, functions[name])


def binary(pool: Pool, x: int) -> None:
    shape = pool.examples[x].shape
    y = pool.choose(lambda e: e.shape == shape and e.is_floating_point())
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add, "mul": torch.mul, "maximum": torch.maximum,
        "cat": lambda a, b: torch.cat([a, b], 1),
    }  # fmt: skip
    name = pool.draw(st.sampled_from(sorted(functions)))
    assert y is not None
    pool.add(lambda m, v: functions[name](v[x], v[y]))


def in_place(pool: Pool, x: int) -> None:
    """Reads a fresh value before and after a write to it, by itself and through a view."""
    fresh = pool.apply(x, torch.sin)
    seen = pool.apply(fresh, lambda v: v.view(v.shape))
    before = pool.apply(pool.draw(st.sampled_from([fresh, seen])), lambda v: v * 2)
    write = pool.draw(st.sampled_from([lambda v: v.relu_(), lambda v: v.add_(1)]))
    pool.apply(fresh, write)
    after = pool.apply(seen, lambda v: v * 2)
    pool.add(lambda m, v: v[before] + v[after] * v[fresh])


def filled_in(pool: Pool, x: int) -> None:
    """Adds zeros that the graph fills in: constant to look at, but not constant."""
    width = pool.examples[x].shape[-1]

    def step(m: Generated, values: list[Tensor]) -> Tensor:
        mask = torch.zeros(width)
        mask[width // 2] = values[x].mean()
        return values[x] + mask

    pool.add(step)


def duplicate(pool: Pool, x: int) -> None:
    """Computes a value twice, and nearly the same value a third time."""
    first = pool.apply(x, lambda v: v * 3)
    second = pool.apply(x, lambda v: v * 3)
    third = pool.apply(x, lambda v: v * 5)
    pool.add(lambda m, v: v[first].sin() + v[second] + v[third])


def linear(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    out = pool.draw(st.sampled_from(WIDTHS))
    bias = pool.draw(st.booleans())
    pool.call(pool.part(lambda: nn.Linear(width, out, bias=bias)), x)


def normalise(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    kinds: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(width), "rms": lambda: nn.RMSNorm(width),
        "written out": lambda: RmsNorm(width), "bare": lambda: nn.LayerNorm(width, bias=False),
    }  # fmt: skip
    name = pool.part(kinds[pool.draw(st.sampled_from(sorted(kinds)))])
    pool.call(name, x)


def convolution(pool: Pool, x: int) -> int:
    """Any convolution of an image: kernel, stride, padding and groups within bounds."""
    _, channels, height, width = pool.examples[x].shape
    kernel = pool.draw(st.integers(1, min(3, height, width)))
    groups = pool.draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = pool.draw(st.sampled_from([channels, groups, 3 * groups]))
    options = {
        "kernel_size": kernel, "padding": pool.draw(st.integers(0, kernel // 2)),
        "stride": pool.draw(st.integers(1, 2)), "groups": groups, "bias": pool.draw(st.booleans()),
    }  # fmt: skip
    if pool.draw(st.integers(0, 4)) == 0:
        return pool.call(pool.part(lambda: nn.ConvTranspose2d(channels, out, **options)), x)
    return pool.call(pool.part(lambda: nn.Conv2d(channels, out, **options)), x)


def batch_norm(pool: Pool, x: int) -> int:
    channels = pool.examples[x].shape[1]
    affine = pool.draw(st.booleans())
    return pool.call(pool.part(lambda: nn.BatchNorm2d(channels, affine=affine)), x)


# ---- motifs


def conv_bn_relu(pool: Pool, x: int) -> None:
    y = batch_norm(pool, convolution(pool, x))
    if pool.draw(st.booleans()):
        pool.apply(y, lambda v: v.relu_())
    else:
        pool.apply(y, F.relu)


def mlp(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    hidden = pool.draw(st.sampled_from(WIDTHS))
    up = pool.call(pool.part(lambda: nn.Linear(width, hidden)), x)
    middle = pool.apply(up, F.gelu)
    down = pool.call(pool.part(lambda: nn.Linear(hidden, width)), middle)
    pool.add(lambda m, v: v[x] + v[down])


def scaled_activation(pool: Pool, x: int) -> None:
    """A scale that a nonlinearity keeps apart from the layer before it."""
    width = pool.examples[x].shape[-1]
    up = pool.call(pool.part(lambda: nn.Linear(width, 8)), x)
    pool.apply(pool.apply(up, F.gelu), lambda v: v * 0.5)


def gated(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    hidden = pool.draw(st.sampled_from(WIDTHS))
    gate = pool.call(pool.part(lambda: nn.Linear(width, hidden, bias=False)), x)
    up = pool.call(pool.part(lambda: nn.Linear(width, hidden, bias=False)), x)
    product = pool.add(lambda m, v: F.silu(v[gate]) * v[up])
    pool.call(pool.part(lambda: nn.Linear(hidden, width)), product)


def normed_linears(pool: Pool, x: int) -> None:
    """A norm that feeds linear layers, one of them directly or across another operator."""
    normalise(pool, x)
    y = len(pool.examples) - 1
    between: list[Callable[[Tensor], Tensor]] = [
        torch.abs, lambda v: v.transpose(0, 1), lambda v: v.clone(), lambda v: v[:, :1],
    ]  # fmt: skip
    if pool.draw(st.booleans()):
        linear(pool, y)
    linear(pool, pool.apply(y, pool.draw(st.sampled_from(between))))


def shifted_image(pool: Pool, x: int) -> None:
    """An image normalised inside the model, before a convolution that may pad."""
    channels = pool.examples[x].shape[1]
    mean, deviation = pool.weight(channels, 1, 1), pool.weight(channels, 1, 1)
    y = pool.add(lambda m, v: (v[x] - getattr(m, mean)) / getattr(m, deviation))
    convolution(pool, y)


def attention(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    inner = pool.call(pool.part(lambda: nn.Linear(width, 8, bias=False)), x)
    kv_heads = pool.draw(st.sampled_from([1, 2, 4]))
    pool.call(pool.part(lambda: Attention(8, 4, kv_heads)), inner)


def scaled_projection(pool: Pool, x: int) -> None:
    """A scale after the heads are split, as older attention modules write it."""
    width = pool.examples[x].shape[-1]
    y = pool.call(pool.part(lambda: nn.Linear(width, 8)), x)
    heads = pool.apply(y, lambda v: v.unflatten(-1, (2, 4)).transpose(1, 2))
    scaled = pool.apply(heads, lambda v: v * 0.5)
    pool.apply(scaled, lambda v: v.transpose(1, 2).flatten(2))


def called_twice(pool: Pool, x: int) -> None:
    width = pool.examples[x].shape[-1]
    name = pool.part(lambda: nn.Linear(width, width))
    once = pool.call(name, x)
    middle = pool.apply(once, torch.tanh)
    pool.call(name, middle)


def tied_table(pool: Pool, x: int) -> None:
    """An embedding and a head that share their weight; sometimes scaled."""
    width = pool.draw(st.sampled_from((4, 8)))
    name = pool.part(lambda: nn.Embedding(12, width))
    rows = pool.call(name, x)
    if pool.draw(st.booleans()):
        rows = pool.apply(rows, lambda v: v * width**0.5)
    if pool.draw(st.booleans()):
        pool.add(lambda m, v: F.linear(v[rows], m.parts[name].weight))


_Grow = Callable[[Pool, int], Any]
OPERATORS: list[tuple[Callable[[Tensor], bool], _Grow]] = [
    (_is_float, unary), (_is_float, scalar), (_is_float, channel_constant), (_is_float, view),
    (_is_float, view), (_is_float, binary), (_is_float, in_place), (_is_float, duplicate),
    (_is_float, filled_in), (_is_float, computed_constant), (_is_rows, linear),
    (_varies, normalise), (_is_image, convolution), (_is_image, batch_norm),
]  # fmt: skip
MOTIFS: list[tuple[Callable[[Tensor], bool], _Grow]] = [
    (_is_rows, mlp), (_is_rows, scaled_activation), (_is_rows, gated), (_varies, normed_linears),
    (_is_rows, attention), (_is_rows, scaled_projection), (_is_rows, called_twice),
    (_is_tokens, tied_table), (_is_image, conv_bn_relu), (_is_image, shifted_image),
]  # fmt: skip


@st.composite
def samples(draw: Callable[[Any], Any], max_steps: int = 10, motif: _Grow | None = None) -> Sample:
    """A random module with inputs to capture it; half of them with a dynamic batch.

    With a ``motif``, every module begins with it, on an input it accepts.
    """
    accepts = {function: accept for accept, function in [*OPERATORS, *MOTIFS]}
    kinds = {"rows": _is_rows, "image": _is_image, "tokens": _is_tokens}
    if motif is not None:
        fitting = {_is_float: ["rows", "image"], _varies: ["rows"]}
        named = [kind for kind, accept in kinds.items() if accept is accepts[motif]]
        kind = draw(st.sampled_from(fitting.get(accepts[motif], named)))
    else:
        kind = draw(st.sampled_from(sorted(kinds)))
    dynamic = draw(st.booleans())
    batch = draw(st.integers(1, 3))
    if kind == "rows":
        x = normal(batch, draw(st.sampled_from(TIMES)), draw(st.sampled_from(WIDTHS)))
    elif kind == "image":
        side = draw(st.integers(2, 6))
        x = normal(batch, draw(st.integers(1, 4)), side, side)
    else:
        x = torch.arange(batch * 5).remainder(12).reshape(batch, 5)
    pool = Pool(draw, Generated(), [x])
    if kind == "tokens":
        tied_table(pool, 0)
    elif motif is not None and accepts[motif](x):
        motif(pool, 0)
    for _ in range(draw(st.integers(1, max_steps))):
        grow(pool)
    _choose_outputs(pool)
    return sample_as_it_is(pool.module, x, dynamic=dynamic)


def grow(pool: Pool) -> None:
    """One more operator or motif on a value that accepts it."""
    table = MOTIFS if pool.draw(st.booleans()) else OPERATORS
    fitting = [(a, f) for a, f in table if any(a(example) for example in pool.examples)]
    if fitting:
        accept, function = pool.draw(st.sampled_from(fitting))
        source = pool.choose(accept)
        assert source is not None
        function(pool, source)


def _choose_outputs(pool: Pool) -> None:
    """The last value, and up to two others; what nobody reads stays as dead code."""
    last = len(pool.examples) - 1
    others = pool.draw(st.lists(st.integers(0, last), max_size=2))
    pool.module.outputs = [last, *others]


def sample_as_it_is(module: nn.Module, x: Tensor, *, dynamic: bool) -> Sample:
    """A sample that keeps the weights the module has."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return Sample(module.eval(), (x,), shapes)
