"""The proof of a compile: parity with the program, quality, size, latency and memory, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from mopt.cache import Cache
from mopt.disk import scratch
from mopt.errors import LoweringError, MoptError
from mopt.flops import shape_of
from mopt.inputs import second_size
from mopt.lowering import SAMPLE, Artifact, Loaded
from mopt.measure import Comparison, Sample, Side, Subject, compare, measure_one
from mopt.npz_files import write_npz
from mopt.pass_base import Progress
from mopt.program import Program
from mopt.quality import Drift, DriftMeter, Metric, drift, evaluate_metric
from mopt.registry import find_backend
from mopt.signature import Signature
from mopt.verdicts import check_key, recall

# How far a lowered model may be from the program it was lowered from, relative to the largest
# output: float kernels differ in summation order, integer ones may also flip a rounding.
FLOAT_PARITY = 2e-3
INTEGER_PARITY = 5e-2
# Where flipped roundings grow on their way through a model, two right implementations may differ
# by as much as the quantization itself. Then the lowered model must be as near to the captured one
# as its program is, up to this ratio of noise energies.
NOISE_RATIO = 2.0
QUALITY_BATCHES = 8
SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class Parity:
    """Drift between a program in eager and its lowered form, at the sizes that were tried."""

    drift: Drift
    sizes: int

    def as_json(self) -> dict[str, Any]:
        """Plain numbers for the report."""
        return {**self.drift.as_json(), "sizes_checked": self.sizes}


def check_parity(
    program: Program, loaded: Loaded, captured: Program, *, sizes: int = 2,
    cache: Cache | None = None,
) -> Parity:  # fmt: skip
    """Compare the lowered model with its program on the sample inputs, and at a second size.

    ``sizes`` 1 leaves the second out. ``captured`` is the program before compression, which tells
    how much noise that brings. What was checked before, down to the files, is not checked again.
    Raises LoweringError when it computes something else.
    """

    def check() -> dict[str, Any]:
        return _compare(program, loaded, captured, sizes).as_json()

    key = None
    if cache is not None and loaded.manifest["kind"] == "whole":
        inputs = [(program.args, program.kwargs)]
        key = check_key([program, captured], inputs, "parity", sizes=sizes, **_content(loaded))
    found = recall(cache, key, check)
    return Parity(Drift.from_json(found), found["sizes_checked"])


def _content(loaded: Loaded) -> dict[str, Any]:
    """What a loaded model's outputs depend on besides its inputs."""
    files = {name: entry["sha256"] for name, entry in loaded.manifest["files"].items()
             if name != SAMPLE}  # fmt: skip
    return {"backend": loaded.manifest["backend"], "files": files}


def _compare(program: Program, loaded: Loaded, captured: Program, sizes: int) -> Parity:
    meter, checked = DriftMeter(), 0
    for inputs in islice(_parity_inputs(program), sizes):
        args, kwargs = inputs
        try:
            expected = _tensors(program.run(*args, **kwargs))
        except (RuntimeError, IndexError, ValueError):
            if not checked:
                raise
            break  # the model itself takes no other size, whatever was declared
        try:
            found = _tensors(loaded(*args, **kwargs))
        except MoptError:
            raise
        except Exception as error:  # a runtime may raise anything
            shapes = [tuple(t.shape) for t in _tensors((args, kwargs))]
            raise LoweringError(
                f"the lowered model fails on inputs of shapes {shapes}: {error}",
                code="lowered-fails",
            ) from error
        _check_close(program, expected, found, partial(_outputs, captured, args, kwargs))
        meter.add(expected, found)
        checked += 1
    return Parity(meter.result(), checked)


def _outputs(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return _tensors(program.run(*args, **kwargs))


def _parity_inputs(program: Program) -> Iterable[tuple[tuple[Any, ...], dict[str, Any]]]:
    yield program.args, program.kwargs
    if program.parts().keys() == {""}:
        other = second_size(program)
        if other is not None:
            yield other


def _check_close(
    program: Program,
    expected: list[torch.Tensor],
    found: list[torch.Tensor],
    uncompressed: Callable[[], list[torch.Tensor]],
) -> None:
    if len(expected) != len(found):
        raise LoweringError(
            f"the lowered model has {len(found)} outputs, expected {len(expected)}", code="parity"
        )
    integer = any("mopt" in str(node.target) for part in program.parts().values()
                  for node in part.graph.nodes if node.op == "call_function")  # fmt: skip
    limit = INTEGER_PARITY if integer else FLOAT_PARITY
    for index, (want, have) in enumerate(zip(expected, found, strict=True)):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise LoweringError(
                f"output {index} of the lowered model is {have.dtype} {tuple(have.shape)}, "
                f"expected {want.dtype} {tuple(want.shape)}",
                code="parity",
            )
        if not want.is_floating_point():
            continue
        distance = drift([want], [have])
        if distance.relative <= limit:
            continue
        if not (integer and _as_near(uncompressed()[index], want, have)):
            raise LoweringError(
                f"output {index} of the lowered model differs by {distance.relative:.2e} of its "
                f"range (cosine {distance.cosine:.5f}), at most {limit:.0e} is expected",
                code="parity",
                hint="this is a defect of the lowering: please report it with the model's graph",
            )


def store_sample(program: Program, artifact: Artifact, loaded: Loaded) -> None:
    """Keep the example inputs and what ``loaded`` makes of them, for ``mopt verify``.

    Left out for models in parts and where they would take more than 8 MB.
    """
    if program.parts().keys() != {""}:
        return
    values = [node.meta.get("val") for node in program.graph.output_node().all_input_nodes]
    sizes = [math.prod(shape_of(value)) * value.dtype.itemsize for value in values
             if isinstance(value, torch.Tensor)]  # fmt: skip
    if sum(sizes) > SAMPLE_BYTES:
        return
    outputs = _tensors(loaded(*program.args, **program.kwargs))
    inputs = _tensors((program.args, program.kwargs))
    arrays = {f"input_{i}": _numpy(t) for i, t in enumerate(inputs)}
    arrays |= {f"output_{i}": _numpy(t) for i, t in enumerate(outputs)}
    if sum(array.nbytes for array in arrays.values()) <= SAMPLE_BYTES:
        write_npz(artifact.folder / SAMPLE, arrays)
        artifact.add_file(SAMPLE)


def _as_near(exact: torch.Tensor, want: torch.Tensor, have: torch.Tensor) -> bool:
    """Whether ``have`` is as near to the uncompressed output as ``want`` is."""

    def noise(value: torch.Tensor) -> float:
        return float((value.double() - exact.double()).square().sum())

    return noise(have) <= NOISE_RATIO * noise(want)


@dataclass(frozen=True)
class Quality:
    """The user's metric before and after, and the drift of the outputs."""

    baseline: Metric | None
    result: Metric | None
    drift: Drift
    batches: int

    def as_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        metric = self.result
        return {
            "metric": metric.name if metric else None,
            "higher_is_better": metric.higher_is_better if metric else None,
            "baseline": self.baseline.value if self.baseline else None,
            "result": metric.value if metric else None,
            "batches": self.batches,
            **self.drift.as_json(),
        }

    def kept(self) -> float | None:
        """Quality as a multiple of the uncompressed model's: 1 is equal, 0.99 one percent worse."""
        if self.result is None or self.baseline is None:
            return None
        return 1.0 - self.result.loss_against(self.baseline)


def measure_quality(
    program: Program,
    loaded: Loaded,
    evaluate: Callable[..., Any] | None,
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]],
    progress: Progress,
    known: Quality | None = None,
    cache: Cache | None = None,
) -> Quality:
    """The user's metric for the captured program and its lowered form, and the output drift.

    ``known`` is what was found of another artifact of the same program, whose metric it has. Drift
    that was found before, of the same files, is not computed again; a metric is.
    """
    some = batches or [(program.args, program.kwargs)]

    def check() -> dict[str, Any]:
        meter = DriftMeter()
        for index, (args, kwargs) in enumerate(some):
            progress.step(index, len(some), "batches")
            meter.add(_tensors(program.run(*args, **kwargs)), _tensors(loaded(*args, **kwargs)))
        return meter.result().as_json()

    key = None
    if cache is not None and loaded.manifest["kind"] == "whole":
        key = check_key([program], some, "quality", **_content(loaded))
    moved = Drift.from_json(recall(cache, key, check))
    before = after = None
    if evaluate is not None:
        progress.step(0, 2, "evaluations of the metric")
        before = known.baseline if known else evaluate_metric(evaluate, program.run)
        progress.step(1, 2, "evaluations of the metric")
        after = evaluate_metric(evaluate, _as_callable(loaded))
    return Quality(before, after, moved, len(some))


def _as_callable(loaded: Loaded) -> Callable[..., Any]:
    return lambda *args, **kwargs: loaded(*args, **kwargs)


@dataclass(frozen=True)
class Timing:
    """Measured latency and memory of the artifact beside the uncompressed one."""

    comparison: Comparison
    eager: Side | None


def measure_speed(
    baseline: Artifact,
    artifact: Artifact,
    eager: Artifact | Side | None,
    *,
    threads: int | None,
    seed: int,
    max_seconds: float,
    progress: Progress,
) -> Timing:
    """Alternated fresh processes on the example inputs (see ``mopt.measure``).

    ``eager`` is timed before and after them, where it was not halted; as a ``Side`` it was already.
    """
    with scratch("mopt-measure") as folder:
        inputs = folder / "inputs.npz"
        write_example_inputs(artifact, inputs)
        reference = subject(baseline, inputs, threads, "uncompressed")
        candidate = subject(artifact, inputs, threads, "compressed")
        beside = eager if isinstance(eager, Side) else None
        before: tuple[Sample, ...] = ()
        if isinstance(eager, Artifact):
            plain = subject(eager, inputs, threads, "PyTorch eager")
            before = measure_one(plain, samples=1).samples
        comparison = compare(
            reference,
            candidate,
            quick=True,
            max_seconds=max_seconds,
            seed=seed,
            progress=lambda done, total: progress.step(done, total, "alternated pairs"),
        )
        if isinstance(eager, Artifact):
            after = measure_one(plain, samples=2).samples
            beside = Side(plain.label, before + after).undisturbed()
    return Timing(comparison, beside)


def subject(artifact: Artifact, inputs: Path, threads: int | None, label: str) -> Subject:
    """What to run in a fresh process to time an artifact."""
    backend = find_backend(artifact.manifest["backend"])
    return Subject(backend.bench_command(artifact.folder, inputs, threads=threads), label)


def write_example_inputs(artifact: Artifact, path: Path) -> None:
    """The example inputs of a whole model as ``.npz``, named as in its signature."""
    write_npz(path, example_arrays(artifact))


def example_arrays(artifact: Artifact) -> dict[str, np.ndarray]:
    """The example inputs of a whole model by the names of its signature."""
    program = artifact.program
    assert program is not None
    signature = Signature.from_json(artifact.manifest["parts"][0]["signature"])
    flat = signature.flatten(_plain_inputs(program.args), _plain_inputs(program.kwargs))
    return {spec.name: _numpy(value) for spec, value in zip(signature.inputs, flat, strict=True)}


def _plain_inputs(value: Any) -> Any:
    from mopt.program_signature import plain_containers

    return plain_containers(value)


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _tensors(outputs: Any) -> list[torch.Tensor]:
    from mopt.program_signature import plain_containers

    return [
        leaf for leaf in pytree.tree_leaves(plain_containers(outputs))
        if isinstance(leaf, torch.Tensor)
    ]  # fmt: skip
