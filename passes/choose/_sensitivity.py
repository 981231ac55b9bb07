"""What a format costs in quality: exactly, by swapping it in; or from errors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional

from mopt.cache import library_versions, source_hash
from mopt.calibration import Calibration
from mopt.errors import InputError
from mopt.flops import shape_of
from mopt.formats import find_format
from mopt.formats.base import families
from mopt.hashes import tensor_hash
from mopt.layers import Layer, find_layers
from mopt.pass_base import PassContext, Progress
from mopt.passes.choose._padding import padding_mask, real_rows
from mopt.passes.choose._reruns import Reruns, default_limit
from mopt.pipeline import flat_tensors
from mopt.program import Program
from mopt.quality import DriftMeter, evaluate_metric

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Place(Protocol):
    """Puts formats into a program; ``fitted`` rounds on calibration data where it can."""

    def __call__(
        self, program: Program, formats: Mapping[str, str], ctx: PassContext, *, fitted: bool = ...
    ) -> None: ...


# What losses are measured on where nothing else is asked for: rows of outputs (tokens, samples),
# in as many batches as hold them. One sentence ranks the formats of a layer by its own accidents.
_ROWS, _MOST_BATCHES = 512, 8
_SOURCES = (
    __file__,
    *(str(Path(__file__).with_name(n)) for n in ("_padding.py", "_place.py", "_reruns.py")),
)


def enough_batches(program: Program, data: Iterable[Call], count: int) -> list[Call]:
    """The first ``count`` batches; if 0, as many as give 512 rows of outputs, at most 8."""
    if not count:
        outputs = [node.meta.get("val") for node in program.graph.output_node().all_input_nodes]
        rows = sum(
            math.prod(shape_of(v)[:-1]) for v in outputs if isinstance(v, Tensor) and v.dim()
        )
        count = min(max(math.ceil(_ROWS / max(rows, 1)), 1), _MOST_BATCHES)
    return list(islice(data, count))


def gives_logits(program: Program) -> bool:
    """Whether an output is what a layer computes: what a norm or tanh gives is no logit."""
    calls = {call for layer in find_layers(program) for call in layer.calls}
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    return any(_unviewed(node, calls) in calls for node in output.all_input_nodes)


def _unviewed(node: fx.Node, calls: Set[fx.Node]) -> fx.Node:
    """What a value is a view of, up to the first of ``calls``."""
    while node not in calls and isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0] if node.args else None
        returns = node.target._schema.returns
        if not isinstance(source, fx.Node) or all(one.alias_info is None for one in returns):
            break
        node = source
    return node


@dataclass
class Losses:
    """Measures the loss of formats on a few batches; ``loss`` is kl, cosine or metric.

    - ``kl``: mean Kullback-Leibler divergence, in nats, of the softmax over the last axis
    - ``cosine``: 1 minus the mean cosine of the outputs' rows
    - ``metric``: relative loss of the user's own metric

    Rows at positions that an input ``attention_mask`` marks as padding do not count.
    ``place`` puts formats into a copy of the program. Results go to the context's cache.
    """

    program: Program
    ctx: PassContext
    batches: Sequence[Call]
    loss: str
    place: Place

    def __post_init__(self) -> None:
        self.measured = 0
        self.cached = 0
        self._known_runs: Reruns | None = None
        self._base_metric: Any = None
        self._key: dict[str, Any] | None = None

    def exact(self, formats: Mapping[str, str], *, fitted: bool = False) -> float:
        """The loss with these formats (by layer path) in place of the originals."""

        def change(program: Program, ctx: PassContext) -> None:
            self.place(program, formats, ctx, fitted=fitted)

        key = {"formats": dict(formats), "fitted": fitted}
        return self._known(key, lambda: self._measure(change, dict(formats), renames=True))

    def changed(
        self, change: Callable[[Program, PassContext], None], key: Mapping[str, Any]
    ) -> float:
        """The loss after ``change`` was made to a copy; ``key`` tells it from all others."""
        return self._known(key, lambda: self._measure(change, dict(key), renames=False))

    def _known(self, key: Mapping[str, Any], measure: Callable[[], float]) -> float:
        cache = self.ctx.cache
        if cache is None:
            return measure()
        before = self.measured
        value = float(cache.remember("sensitivity", {**self._what(), **key}, measure))
        self.cached += self.measured == before
        return value

    def _what(self) -> dict[str, Any]:
        if self._key is None:
            sources = sorted({_file_of(family) for family in families()} | set(_SOURCES))
            self._key = {
                "program": self.program.fingerprint(),
                "batches": [[_leaf(leaf) for leaf in _leaves(call)] for call in self.batches],
                "loss": self.loss,
                "metric": getattr(self.ctx.evaluate, "__qualname__", "")
                if self.loss == "metric"
                else "",
                "libraries": library_versions(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "sources": source_hash(*sources),
            }
        return self._key

    def _measure(
        self, change: Callable[[Program, PassContext], None], what: Mapping[str, Any], *,
        renames: bool,
    ) -> float:  # fmt: skip
        """``renames`` says that nodes whose values change get new names."""
        self.ctx.check_time("measuring what candidates cost")
        self.measured += 1
        changed = self.program.copy()
        change(changed, self._context())
        changed.graph_module.recompile()
        if self.loss == "metric":
            assert self.ctx.evaluate is not None
            if self._base_metric is None:
                self._base_metric = evaluate_metric(self.ctx.evaluate, self.program.run)
            found = evaluate_metric(self.ctx.evaluate, changed.run)
            return max(found.loss_against(self._base_metric), 0.0)
        total, meter, rows = 0.0, DriftMeter(), 0
        for index in range(len(self.batches)):
            mask = padding_mask(self.program, *self.batches[index])
            expected, outputs = (
                real_rows(values, mask)
                for values in (self._reruns.outputs[index], self._run(changed, index, renames))
            )
            if self.loss == "cosine":
                meter.add(expected, outputs)
                continue
            for want, have in zip(expected, outputs, strict=True):
                if want.is_floating_point() and want.dim():
                    total += _divergence(want, have)
                    rows += want.numel() // want.shape[-1]
        result = 1.0 - meter.result().cosine if self.loss == "cosine" else total / max(rows, 1)
        if result != result:
            raise InputError(
                f"outputs become NaN with {dict(what)}", code="non-finite-activation",
                hint="leave the layer out with skip=...",
            )  # fmt: skip
        return max(result, 0.0)

    def _context(self) -> PassContext:
        """The context with only the batches that are in the key, for formats that need ranges."""
        if self.ctx.calibration is None or any(args and kwargs for args, kwargs in self.batches):
            return self.ctx
        data = [kwargs or args for args, kwargs in self.batches]
        return replace(self.ctx, calibration=Calibration(data, self.program), progress=Progress())

    @property
    def _reruns(self) -> Reruns:
        if self._known_runs is None:
            limit = default_limit(self.program)
            limit = min(limit, self.ctx.max_memory_bytes or limit)
            self._known_runs = Reruns(self.program, self.batches, limit)
        return self._known_runs

    def _run(self, changed: Program, index: int, renames: bool) -> list[Tensor]:
        if renames:
            return self._reruns.run(changed, index)
        args, kwargs = self.batches[index]
        return flat_tensors(changed.run_flat(*args, **kwargs))


def estimate(
    program: Program, batch: Call, layers: Sequence[Layer], loss: str, seed: int
) -> Callable[[Layer, str], float]:
    """A function from layer and format to a cheap estimate of the loss, up to a factor.

    Half the expected squared product of the layer's output error and the gradient of a sampled
    log-likelihood (the empirical Fisher information, Martens 2020, eq. 6), without terms between
    rows; where the graph has no gradients, the error relative to the output.
    """
    calls = {call: layer for layer in layers for call in layer.calls}
    recorder = _Recorder(program.graph_module, set(calls))
    flat = program.flat_inputs(*batch)
    with torch.enable_grad():
        outputs = flat_tensors(recorder.run(*flat, enable_io_processing=False))
        outputs = real_rows(outputs, padding_mask(program, *batch))
        values = [value for _, _, value in recorder.seen.values()]
        gradients = _gradients(outputs, values, loss, seed)
    found = dict(zip(recorder.seen, gradients, strict=True))
    rows = max(sum(t.numel() // t.shape[-1] for t in outputs if t.dim()), 1)

    def of(layer: Layer, name: str) -> float:
        total = 0.0
        format_ = find_format(name)
        weight = program.weight(layer.weight)
        decoded = format_.decode(format_.encode(weight)).to(weight.dtype)
        for call in layer.calls:
            if call not in recorder.seen:
                continue
            args, kwargs, value = recorder.seen[call]
            with torch.no_grad():
                moved = _recompute(call, args, kwargs, layer, decoded, name) - value
                gradient = found[call]
                if gradient is None:
                    total += float(moved.square().sum() / value.square().sum().clamp(min=1e-30))
                else:
                    along = (moved * gradient).flatten(0, -2).sum(-1) if moved.dim() > 1 else moved
                    total += float(along.square().sum()) / (2 * rows)
        return total

    return of


class _Recorder(fx.Interpreter):
    """Runs with gradients and keeps arguments and results of some calls."""

    def __init__(self, module: fx.GraphModule, calls: set[fx.Node]) -> None:
        super().__init__(module)
        self._calls = calls
        self.seen: dict[fx.Node, tuple[Any, Any, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._calls:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.seen[n] = (args, kwargs, value)
        return value


def _gradients(
    outputs: Sequence[Tensor], values: Sequence[Tensor], loss: str, seed: int
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for out in outputs:
        if not out.is_floating_point() or not out.dim() or not out.requires_grad:
            continue
        if loss == "cosine":
            direction = torch.randn(out.shape, generator=generator)
            norms = out.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
            total = total + (out * direction / norms).sum()
        else:
            logs = functional.log_softmax(out.flatten(0, -2) if out.dim() > 1 else out[None], -1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            total = total - logs.gather(1, drawn).sum()
    if not total.requires_grad:
        return [None] * len(values)
    try:
        return list(torch.autograd.grad(total, list(values), allow_unused=True))
    except RuntimeError:  # an operator without a derivative
        return [None] * len(values)


def _recompute(
    call: fx.Node, args: Any, kwargs: Any, layer: Layer, decoded: Tensor, name: str
) -> Tensor:
    """The call's result with the decoded weight, and its input rounded where the format does."""
    position = 0 if layer.kind == "embedding" else 1
    changed = list(args)
    changed[position] = decoded
    if name.startswith(("int8-dynamic", "int8-qdq")):
        value = args[0]
        low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        step = max((high - low) / 255, 1e-30)
        changed[0] = torch.round(value / step) * step
    assert callable(call.target)
    result: Tensor = call.target(*changed, **kwargs)
    return result


def _divergence(want: Tensor, have: Tensor) -> float:
    reference = functional.log_softmax(want.double(), -1)
    other = functional.log_softmax(have.double(), -1)
    return float((reference.exp() * (reference - other)).sum())


def _leaves(call: Call) -> list[Any]:
    from torch.utils import _pytree as pytree

    return list(pytree.tree_leaves(call))


def _leaf(leaf: Any) -> str:
    return tensor_hash(leaf) if isinstance(leaf, Tensor) else repr(leaf)


def _file_of(cls: type) -> str:
    import inspect

    return inspect.getfile(cls)
