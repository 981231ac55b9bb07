"""What a file of the zoo offers: one `ZooModel` named `MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).parent / "checkpoints"

Run = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A model with everything that is needed to optimize it and to judge the result.

    `build()` returns the module in eval mode, in float32 on the CPU. Two calls give equal weights
    and leave the global random state as it was. `example_inputs()` is the tuple to capture with;
    `dynamic_shapes()` is what `torch.export.export` takes under that name. `calibration()` yields
    input tuples of the example's shapes, disjoint from what `evaluate` uses.

    `evaluate(run)` measures a callable with the module's signature and returns
    `{"metric": str, "value": float, "higher_is_better": bool}`. It feeds the example's shapes only,
    so a program captured without dynamic shapes can be judged too. `sample(run)` returns one short
    line of generated text. Both are None for a model with untrained weights.
    """

    name: str
    summary: str
    trained: bool
    build: Callable[[], nn.Module]
    example_inputs: Callable[[], tuple]
    dynamic_shapes: Callable[[], Any] | None = None
    calibration: Callable[[], Iterable[tuple]] | None = None
    evaluate: Callable[[Run], Mapping[str, Any]] | None = None
    sample: Callable[[Run], str] | None = None
    metric: str = ""
    higher_is_better: bool = True


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block with torch's CPU generator at `seed`; the caller's random state comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def untrained(
    *,
    name: str,
    summary: str,
    make: Callable[[], nn.Module],
    draw: Callable[[], tuple],
    dynamic_shapes: Callable[[], Any] | None = None,
    calibration_batches: int = 16,
) -> ZooModel:
    """An entry with random weights. `make` and `draw` (one tuple of inputs) may use torch's global
    random state: they are called with it seeded."""

    def build() -> nn.Module:
        with seeded(0):
            return make().eval()

    def batch(seed: int) -> tuple:
        with seeded(seed):
            return draw()

    return ZooModel(
        name=name,
        summary=summary,
        trained=False,
        build=build,
        example_inputs=lambda: batch(1),
        dynamic_shapes=dynamic_shapes,
        calibration=lambda: (batch(2 + index) for index in range(calibration_batches)),
    )


def load_checkpoint(module: nn.Module, name: str) -> nn.Module:
    """Fill `module` from `checkpoints/<name>.safetensors`, stored in float16; eval mode.

    Raises KeyError or RuntimeError from torch when the names or shapes do not agree.
    """
    stored = load_file(CHECKPOINTS / f"{name}.safetensors")
    module.load_state_dict({key: _widened(value) for key, value in stored.items()})
    return module.eval()


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
