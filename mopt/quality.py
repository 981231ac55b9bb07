"""How far outputs are from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopt.errors import InputError, quote

# Values compared at a time: float64 copies of all logits of a language model would not stay in any
# cache, and took most of the time of a comparison.
_TOGETHER = 1 << 17


@dataclass(frozen=True)
class Drift:
    """Distance between two sets of outputs, over all floating-point tensors together.

    ``cosine`` is the mean cosine over the rows of the last axis; ``sqnr_db`` the signal to noise
    ratio in dB (infinite for equal outputs); ``max_abs`` the largest difference; ``relative`` that
    difference over the reference's largest magnitude; ``agreement`` the share of rows whose largest
    element is at the same place.
    """

    cosine: float
    sqnr_db: float
    max_abs: float
    relative: float
    agreement: float

    def as_json(self) -> dict[str, float | None]:
        """Plain numbers; an infinite ratio becomes null."""
        return {
            "cosine": self.cosine,
            "sqnr_db": None if math.isinf(self.sqnr_db) else self.sqnr_db,
            "max_abs": self.max_abs,
            "relative": self.relative,
            "agreement": self.agreement,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Drift:
        """The inverse of :meth:`as_json`; other keys are passed over."""
        ratio = math.inf if data["sqnr_db"] is None else data["sqnr_db"]
        return Drift(data["cosine"], ratio, data["max_abs"], data["relative"], data["agreement"])


class DriftMeter:
    """Adds up drift over batches, in float64, without keeping outputs."""

    def __init__(self) -> None:
        self._signal = self._noise = self._peak = self._worst = 0.0
        self._cosines = self._agree = 0.0
        self._rows = 0

    def add(self, reference: Iterable[Any], outputs: Iterable[Any]) -> None:
        """Compare one batch of outputs, tensor by tensor."""
        for expected, found in zip(reference, outputs, strict=True):
            if not isinstance(expected, Tensor):
                continue
            if expected.shape != found.shape:
                raise InputError(
                    f"an output has shape {tuple(found.shape)}, expected {tuple(expected.shape)}",
                    code="output-shape",
                )
            if expected.numel():
                width = expected.shape[-1] if expected.dim() else 1
                rows = max(1, _TOGETHER // max(1, width))
                left, right = (value.detach().cpu().reshape(-1, width).split(rows)
                               for value in (expected, found))  # fmt: skip
                for piece, other in zip(left, right, strict=True):
                    self._add_rows(piece.double(), other.double())

    def _add_rows(self, expected: Tensor, found: Tensor) -> None:
        same = expected == found  # also where both are the same infinity
        difference = torch.where(same, torch.zeros_like(expected), found - expected)
        clean = torch.where(torch.isfinite(expected), expected, torch.zeros_like(expected))
        self._signal += float(clean.square().sum())
        self._noise += float(difference.square().sum())
        self._peak = max(self._peak, float(clean.abs().max()))
        self._worst = max(self._worst, float(difference.abs().max()))
        left, right = clean, torch.where(same, clean, found)
        norms = left.norm(dim=1) * right.norm(dim=1)
        equal = (left == right).all(dim=1)
        ratio = (left * right).sum(1) / torch.where(norms > 0, norms, torch.ones_like(norms))
        self._cosines += float(torch.where(equal, torch.ones_like(ratio), ratio).sum())
        self._agree += float((left.argmax(1) == right.argmax(1)).sum())
        self._rows += left.shape[0]

    def result(self) -> Drift:
        """The drift over everything added so far."""
        rows = max(self._rows, 1)
        noise = self._noise
        return Drift(
            cosine=self._cosines / rows if self._rows else 1.0,
            sqnr_db=math.inf if noise == 0 else 10 * math.log10(max(self._signal, 1e-300) / noise),
            max_abs=self._worst,
            relative=self._worst / self._peak if self._peak > 0 else self._worst,
            agreement=self._agree / rows if self._rows else 1.0,
        )


def drift(reference: Iterable[Any], outputs: Iterable[Any]) -> Drift:
    """The drift between two lists of output tensors."""
    meter = DriftMeter()
    meter.add(reference, outputs)
    return meter.result()


@dataclass(frozen=True)
class Metric:
    """A value of the user's own metric."""

    name: str
    value: float
    higher_is_better: bool

    def loss_against(self, baseline: Metric) -> float:
        """Relative loss of quality against ``baseline``: 0.01 is one percent worse."""
        change = (self.value - baseline.value) / max(abs(baseline.value), 1e-12)
        return -change if self.higher_is_better else change


def evaluate_metric(evaluate: Callable[..., Any], run: Callable[..., Any]) -> Metric:
    """Call the user's ``evaluate(run)``: it returns a number, or a mapping with metric, value and
    higher_is_better (which also may be attributes of the function).
    """
    result = evaluate(run)
    name = getattr(evaluate, "metric", getattr(evaluate, "__name__", "quality"))
    higher = bool(getattr(evaluate, "higher_is_better", True))
    value: Any = result
    if isinstance(result, Mapping):
        value = result.get("value")
        name = str(result.get("metric", name))
        higher = bool(result.get("higher_is_better", higher))
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"evaluate returned {quote(result)}, expected a number",
            code="bad-metric",
            hint='return a number, or {"metric": ..., "value": 0.9, "higher_is_better": True}',
        ) from error
    if not math.isfinite(number):
        raise InputError(f"evaluate returned {number}", code="bad-metric")
    return Metric(name, number, higher)
