"""The one loop that runs passes, and checks every claim they make.

For each pass: copy, run, compare the ``changed`` claim with the fingerprint both ways, verify the
graph, and compare outputs on the sample inputs with those before the pass (exact: equal; rounding:
within the pass's bound; lossy: recorded).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.allowance import TIME_IS_UP
from mopt.errors import LimitError, MoptError, PassError, quote
from mopt.hashes import tensor_hash
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, Skip
from mopt.program import Program, site_of
from mopt.quality import Drift, drift
from mopt.verdicts import check_key, recall


@dataclass(frozen=True)
class Step:
    """What one pass did to a program. ``drift`` is against the captured program."""

    name: str
    numerics: str
    options: dict[str, Any]
    changed: bool
    seconds: float
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    stats: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    drift: Drift | None = None

    def as_json(self) -> dict[str, Any]:
        """The step as plain data for the report."""
        return {
            "name": self.name,
            "numerics": self.numerics,
            "options": self.options,
            "changed": self.changed,
            "seconds": round(self.seconds, 4),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "stats": self.stats,
            "skipped": [{"site": s.site, "reason": s.reason} for s in self.skipped],
            "drift": self.drift.as_json() if self.drift else None,
        }


class Pipeline:
    """Passes in order. ``watchers`` are called with every finished Step."""

    def __init__(
        self, passes: Iterable[Pass], watchers: Sequence[Callable[[Step], None]] = ()
    ) -> None:
        self.passes = tuple(passes)
        self.watchers = tuple(watchers)

    def run(
        self,
        program: Program,
        context: PassContext | None = None,
        *,
        reference: Program | None = None,
    ) -> Program:
        """A new program after every pass; ``program`` is untouched and ``.steps`` tells the story.

        ``reference`` is what drift is measured against, ``program`` itself unless given.
        Raises PassError when a pass breaks a promise, naming the pass, the first node whose value
        differs and its source line; any error of a pass itself is wrapped the same way. Where the
        context has an allowance whose time is up, the result is what was done until then, if a
        lossy pass was done.
        """
        ctx = context or PassContext()
        count = len(self.passes)
        ctx.progress.step(0, count, "passes, running the model before them")
        before = {path: _Outputs(part) for path, part in program.parts().items()}
        captured = before
        if reference is not None and reference.fingerprint() != program.fingerprint():
            captured = {path: _Outputs(part) for path, part in reference.parts().items()}
        moved: Drift | None = None
        current, unrounded = program, ctx.unrounded or program
        steps: list[Step] = list(program.steps)
        for index, one in enumerate(self.passes):
            ctx.progress.step(index, count, f"passes, now {one.pass_name}")
            checking = partial(ctx.progress.step, index, count, f"passes, checking {one.pass_name}")
            given = replace(ctx, unrounded=unrounded)
            lossless = current is unrounded and one.numerics is not Numerics.LOSSY
            try:
                ctx.check_time(f"running {one.pass_name}")
                current, before, step = _run_one(
                    one, current, before, captured, given, checking, moved
                )
            except LimitError as error:
                has_some = any(s.changed and s.numerics == Numerics.LOSSY.value for s in steps)
                if error.code != TIME_IS_UP or ctx.allowance is None or not has_some:
                    raise
                ctx.allowance.stop(error.message, one.pass_name)
                break
            unrounded = current if lossless else unrounded
            moved = step.drift
            steps.append(step)
            for watcher in self.watchers:
                watcher(step)
        result = current if self.passes else program.copy()
        result.steps = steps
        return result


class _Outputs:
    """The output tensors of a program on its sample inputs, computed when first asked for."""

    def __init__(self, part: Program) -> None:
        self.part = part
        self._values: list[Any] | None = None

    def __call__(self) -> list[Any]:
        if self._values is None:
            self._values = _outputs(self.part)
        return self._values


def _run_one(
    one: Pass,
    program: Program,
    before: dict[str, _Outputs],
    captured: dict[str, _Outputs],
    ctx: PassContext,
    checking: Callable[[], None],
    moved: Drift | None,
) -> tuple[Program, dict[str, _Outputs], Step]:
    """``moved`` is the drift of ``before``, where it is known."""
    started = time.perf_counter()
    candidate = program.copy()
    results: list[PassResult] = []
    after: dict[str, _Outputs] = {}
    old_parts, changed = program.parts(), False
    for path, part in candidate.parts().items():
        result = _run_part(one, old_parts[path], part, ctx, checking)
        results.append(result)
        changed = changed or result.changed
        after[path] = _Outputs(part) if result.changed else before[path]
    if changed or moved is None:
        moved = _judge(one, before, after, captured, ctx)
    step = Step(
        name=one.pass_name,
        numerics=one.numerics.value,
        options=one.options(),
        changed=changed,
        seconds=time.perf_counter() - started,
        bytes_before=program.size_bytes(),
        bytes_after=candidate.size_bytes(),
        flops_before=program.flops(),
        flops_after=candidate.flops(),
        stats=_merge_stats(results),
        skipped=tuple(skip for result in results for skip in result.skipped),
        drift=moved,
    )
    return candidate, after, step


def _judge(
    one: Pass, before: dict[str, _Outputs], after: dict[str, _Outputs],
    captured: dict[str, _Outputs], ctx: PassContext,
) -> Drift:  # fmt: skip
    """Check what a pass claims of the outputs; how far they are from the captured ones now.

    A check that was done before, on programs of the same content, is not done again.
    """

    def check() -> dict[str, Any]:
        for path, new in after.items():
            if new is not before[path]:
                found = _outputs_after(one, new)
                _check_numerics(one, before[path].part, new.part, before[path](), found)
        pairs = [(captured[path](), after[path]()) for path in captured]
        return drift([t for ref, _ in pairs for t in ref],
                     [t for _, new in pairs for t in new]).as_json()  # fmt: skip

    parts = [value.part for group in (before, after, captured) for value in group.values()]
    key = None
    if ctx.cache is not None:
        inputs = [(part.args, part.kwargs) for part in parts]
        key = check_key(parts, inputs, "pass", numerics=one.numerics.value, bound=one.tolerance)
    return Drift.from_json(recall(ctx.cache, key, check))


def _run_part(
    one: Pass, old: Program, part: Program, ctx: PassContext, checking: Callable[[], None]
) -> PassResult:
    reason = one.requires(part, ctx)
    if reason and one.optional:
        return PassResult(changed=False, skipped=(Skip(part.path or "model", reason),))
    if reason:
        raise PassError(
            f"{one.pass_name}: {reason}",
            code="pass-requires",
            hint=f"mopt passes explain {one.pass_name}",
        )
    original, weights = old.fingerprint(), _weight_hashes(old)
    try:
        result = one.run(part, ctx)
    except (MoptError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # a pass may fail in any way; the pipeline names it
        raise PassError(
            f"{one.pass_name}: failed with {type(error).__name__}: {error}",
            code="pass-failed",
            hint="run with -v for the traceback, or leave the pass out",
        ) from error
    checking()  # may take as long as the pass, whose last word should not stand there meanwhile
    try:
        part.verify()
    except PassError as error:
        raise PassError(f"{one.pass_name}: {error.message}", code=error.code, site=error.site,
                        hint=error.hint) from error  # fmt: skip
    part.refresh()
    written = [path for path, digest in _weight_hashes(old).items() if digest != weights[path]]
    if written:
        raise PassError(
            f"{one.pass_name}: wrote to weight {written[0]!r}, which the original program shares",
            code="shared-weight-written",
            hint="store a new tensor with Program.add_weight; weights are never written to",
        )
    differs = original != part.fingerprint()
    if differs != result.changed:
        said, found = ("changed", "is the same") if result.changed else ("unchanged", "differs")
        raise PassError(
            f"{one.pass_name}: says the program is {said}, but its fingerprint {found}",
            code="false-claim",
        )
    broken = one.ensures(part, ctx)
    if broken:
        raise PassError(f"{one.pass_name}: did not keep its promise: {broken}", code="pass-ensures")
    return result


def _weight_hashes(part: Program) -> dict[str, str]:
    return {path: tensor_hash(tensor) for path, tensor in part.weights().items()}


def _outputs(part: Program) -> list[Any]:
    return [t for t in part.run_flat(*part.args, **part.kwargs) if isinstance(t, Tensor)]


def _outputs_after(one: Pass, outputs: _Outputs) -> list[Any]:
    part = outputs.part
    try:
        return outputs()
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # whatever an operator raises on its inputs
        node = _first_failing_node(part)
        where = f" at node {node.name!r}" if node is not None else ""
        raise PassError(
            f"{one.pass_name}: the program no longer runs on the sample inputs, it fails{where}: "
            f"{type(error).__name__}: {error}",
            code="program-fails",
            site=site_of(node) if node is not None else None,
            hint="leave the layer out with skip=..., or report the pass",
        ) from error


def _first_failing_node(part: Program) -> fx.Node | None:
    """The node after the last one that still computes a value."""
    done: set[fx.Node] = set()
    try:
        part.interpret(lambda node, value: done.add(node), part.args, part.kwargs)
    except Exception:  # the failure that is being located
        return next((node for node in part.graph.nodes if node not in done), None)
    return None


def _check_numerics(
    one: Pass, old: Program, new: Program, before: list[Tensor], after: list[Tensor]
) -> None:
    for expected, found in zip(before, after, strict=True):
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise PassError(
                f"{one.pass_name}: an output became {found.dtype} {tuple(found.shape)}, "
                f"it was {expected.dtype} {tuple(expected.shape)}",
                code="output-shape",
            )
    if any(bool((expected.isfinite() & ~found.isfinite()).any())
           for expected, found in zip(before, after, strict=True)):  # fmt: skip
        _diverged(one, old, new, math.inf, "gives NaN or infinity")
    if one.numerics is Numerics.EXACT:
        for expected, found in zip(before, after, strict=True):
            if not torch.equal(expected, found) and not _same_with_nan(expected, found):
                _diverged(one, old, new, 0.0, "is exact, but changes the output")
    elif one.numerics is Numerics.ROUNDING:
        found_drift = max((drift([b], [a]).relative for b, a in zip(before, after, strict=True)),
                          default=0.0)  # fmt: skip
        bound = rounding_bound(one, old)
        if not found_drift <= bound:
            _diverged(
                one, old, new, bound,
                f"moves the output by {found_drift:.2e} of its range, its bound is {bound:.0e}",
            )  # fmt: skip


def rounding_bound(one: Pass, program: Program) -> float:
    """How far a rounding pass may move an output of ``program``, relative to its largest magnitude.

    The pass states a bound for 32-bit values. Where values have 16 bits, every one of them is off
    by half an epsilon already: eight epsilons cover a chain of layers rounded in another order.
    """
    kinds = {value.dtype for node in program.graph.nodes for value in [node.meta.get("val")]
             if isinstance(value, Tensor)}  # fmt: skip
    half = [torch.finfo(dtype).eps for dtype in kinds & {torch.float16, torch.bfloat16}]
    return max([one.tolerance, *(8 * eps for eps in half)])


def _same_with_nan(expected: Tensor, found: Tensor) -> bool:
    return expected.is_floating_point() and torch.allclose(
        expected, found, rtol=0, atol=0, equal_nan=True
    )


def _diverged(one: Pass, old: Program, new: Program, bound: float, what: str) -> None:
    node = first_diverging_node(old, new, bound)
    where = f"; first at node {node.name!r}" if node is not None else ""
    raise PassError(
        f"{one.pass_name}: {what}{where}",
        code="numerics",
        site=site_of(node) if node is not None else None,
        hint="leave the layer out with skip=..., or report the pass",
    )


def first_diverging_node(old: Program, new: Program, bound: float) -> fx.Node | None:
    """The first node present in both programs whose value on the sample inputs differs.

    ``bound`` is the relative difference allowed; infinity looks for the first non-finite value.
    """
    values: dict[str, Tensor] = {}

    def remember(node: fx.Node, value: Any) -> None:
        if node.op == "call_function" and isinstance(value, Tensor):
            values[node.name] = value.clone()  # a later call may write to it

    old.interpret(remember, old.args, old.kwargs)
    found: list[fx.Node] = []

    def compare(node: fx.Node, value: Any) -> None:
        if found or node.name not in values or not isinstance(value, Tensor):
            return
        expected = values[node.name]
        if expected.shape != value.shape:
            return
        if math.isinf(bound):
            wrong = bool((expected.isfinite() & ~value.isfinite()).any())
        elif bound == 0:
            wrong = not torch.equal(expected, value) and not _same_with_nan(expected, value)
        else:
            wrong = not drift([expected], [value]).relative <= bound
        if wrong:
            found.append(node)

    new.interpret(compare, new.args, new.kwargs)
    return found[0] if found else None


def _merge_stats(results: list[PassResult]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for result in results:
        for key, value in result.stats.items():
            both_numbers = isinstance(value, int | float) and isinstance(
                merged.get(key), int | float
            )
            if both_numbers:
                merged[key] = merged[key] + value
            elif isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = {**merged[key], **value}
            elif isinstance(value, Tensor):
                raise PassError(f"statistic {quote(key)} is a tensor", code="bad-statistics")
            else:
                merged[key] = value
    return merged


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in a model's outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
