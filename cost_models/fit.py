"""Turn timings of a family into a function of its sizes: a roofline, and what is left over.

The time is ``roofline(sizes) * exp(rest(features))``. The roofline has seven numbers (``Rates``),
found by least squares on logarithms with a pull towards the values of the processor's class. The
rest is a Gaussian process over the logarithms of the sizes: it goes through the timings as far as
their noise allows, returns to the roofline away from them, and says how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace

import numpy as np

from mopt.cost_models.family import Dims, Family
from mopt.device_calibration import FamilyFit, Point, Rates

# By logarithm, in the order of ``Rates``: how far each may stray from what the class of processor
# suggests before it costs as much as being wrong by one.
_PULL = np.array([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.3])
_HUBER = 0.25
_LEAST_NOISE = 0.015
# An operator timed on a busy machine is that much less certain.
_BUSY_NOISE = 0.15
_FOLDS = 5
_QUANTILE_90 = 1.645
_LEAST_SIGNAL, _MOST_SIGNAL = 0.02, 1.5
_LENGTHS = (0.4, 20.0)


def roofline_seconds(rates: Rates, amounts: np.ndarray) -> np.ndarray:
    """The times of several pieces of work, one in each row (see ``as_rows``)."""
    speeds = (rates.operations, rates.weights, rates.inputs, rates.outputs, rates.pieces)
    terms = amounts / np.array(speeds)
    # Scaled by the largest term: a power of nanoseconds would underflow.
    top = np.maximum(terms.max(1, keepdims=True), 1e-12)
    busy = top[:, 0] * ((terms / top) ** rates.overlap).sum(1) ** (1 / rates.overlap)
    return np.asarray(rates.launch + busy)


def as_rows(family: Family, dims: Sequence[Dims]) -> np.ndarray:
    """The amounts of work of some sizes, as ``roofline_seconds`` takes them."""
    return np.array([astuple(family.amount(d)) for d in dims], dtype=float)


class Predictor:
    """A fit, ready to be asked."""

    def __init__(self, family: Family, fit: FamilyFit) -> None:
        self.family = family
        self.fit = fit
        self._inputs = _features(family, [p.dims for p in fit.points])
        times = np.array([p.microseconds for p in fit.points])
        rest = np.log(times * 1e-6) - _log_roofline(family, fit, [p.dims for p in fit.points])
        noise = np.array([math.hypot(p.noise, fit.noise) for p in fit.points])
        covariance = _kernel(self._inputs, self._inputs, fit.lengths, fit.signal)
        self._factor = np.linalg.cholesky(covariance + np.diag(noise**2))
        self._weights = _solve(self._factor, rest)

    def seconds(self, dims: Dims) -> tuple[float, float]:
        """The time of an operator, and the standard error of its logarithm."""
        found, error = self.many([dims])
        return float(found[0]), float(error[0])

    def many(self, dims: Sequence[Dims]) -> tuple[np.ndarray, np.ndarray]:
        """Times and errors for several sizes."""
        fit = self.fit
        cross = _kernel(_features(self.family, dims), self._inputs, fit.lengths, fit.signal)
        log_time = _log_roofline(self.family, fit, dims) + cross @ self._weights
        left = np.linalg.solve(self._factor, cross.T)
        variance = np.maximum(fit.signal**2 - (left**2).sum(0), 0.0) + fit.noise**2
        return np.exp(log_time), fit.inflation * np.sqrt(variance)


def fit_family(
    family: Family, points: Sequence[Point], guess: Rates
) -> tuple[FamilyFit, list[float]]:
    """The fit to all points, and the errors (|log ratio|) that fits to some have on the others.

    ``guess`` is the roofline of the processor's class, used where the points say nothing. Every
    part of the fit, the smoothness included, is found anew without the points it is tried on.
    """
    points = tuple(points)
    whole = _fit(family, points, guess)
    folds = min(_FOLDS, len(points))
    if folds < 4:
        return replace(whole, inflation=2.0), []
    errors: list[float] = []
    scaled: list[float] = []
    for fold in range(folds):
        kept = [p for i, p in enumerate(points) if i % folds != fold]
        left_out = [p for i, p in enumerate(points) if i % folds == fold]
        part = Predictor(family, _fit(family, kept, guess, whole))
        found, sure = part.many([p.dims for p in left_out])
        wrong = np.abs(np.log(found * 1e6 / np.array([p.microseconds for p in left_out])))
        errors.extend(wrong)
        scaled.extend(wrong / sure)
    inflation = float(np.quantile(scaled, 0.9)) / _QUANTILE_90
    fit = replace(
        whole,
        inflation=min(max(inflation, 0.7), 4.0),
        median_error=float(np.median(errors)),
        error_90=float(np.quantile(errors, 0.9)),
    )
    return fit, errors


def _log_roofline(family: Family, fit: FamilyFit, dims: Sequence[Dims]) -> np.ndarray:
    return np.log(roofline_seconds(fit.rates, as_rows(family, dims)))


def _features(family: Family, dims: Sequence[Dims]) -> np.ndarray:
    return np.array([family.features(d) for d in dims], dtype=float)


# ---- least squares


def _fit(
    family: Family, points: Sequence[Point], guess: Rates, near: FamilyFit | None = None
) -> FamilyFit:
    """The fit to points; the search for smoothness starts at that of ``near``, if given."""
    rates = _fit_roofline(family, points, guess)
    dims = [p.dims for p in points]
    times = 1e-6 * np.array([p.microseconds for p in points])
    rest = np.log(times / roofline_seconds(rates, as_rows(family, dims)))
    own = np.array([p.noise for p in points])
    lengths, signal, noise = _fit_process(_features(family, dims), rest, own, near)
    return FamilyFit(family.name, rates, lengths, signal, noise, 1.0, tuple(points))


def _fit_roofline(family: Family, points: Sequence[Point], guess: Rates) -> Rates:
    """Levenberg-Marquardt on the logarithms, with Huber weights and the pull to the guess."""
    start = np.log(astuple(guess))
    amounts = as_rows(family, [p.dims for p in points])
    target = np.log([1e-6 * p.microseconds for p in points])

    def errors(theta: np.ndarray) -> np.ndarray:
        return np.asarray(target - np.log(roofline_seconds(_rates(theta), amounts)))

    def loss(theta: np.ndarray) -> float:
        size = np.abs(errors(theta))
        huber = np.where(size < _HUBER, size**2, 2 * _HUBER * size - _HUBER**2)
        return float(huber.sum() + (((theta - start) / _PULL) ** 2).sum() * _HUBER**2)

    theta, damping = start, 1.0
    best = loss(theta)
    for _ in range(40):
        wrong = errors(theta)
        slopes = np.stack(
            [(errors(theta + 1e-4 * step) - wrong) / 1e-4 for step in np.eye(len(theta))], axis=1
        )
        weight = np.minimum(1.0, _HUBER / np.maximum(np.abs(wrong), 1e-9))
        pull = _HUBER**2 / _PULL**2
        matrix = slopes.T @ (weight[:, None] * slopes) + np.diag(pull)
        vector = -slopes.T @ (weight * wrong) - pull * (theta - start)
        step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), vector)
        tried = theta + np.clip(step, -1.5, 1.5)
        if (found := loss(tried)) < best:
            if best - found < 1e-7:
                theta = tried
                break
            theta, best, damping = tried, found, damping / 4
        else:
            damping *= 4
            if damping > 1e6:
                break
    return _rates(theta)


def _rates(theta: np.ndarray) -> Rates:
    rates = Rates(*(float(value) for value in np.exp(theta)))
    return replace(rates, overlap=max(rates.overlap, 1.0))


# ---- the Gaussian process


def _kernel(
    one: np.ndarray, other: np.ndarray, lengths: tuple[float, ...], signal: float
) -> np.ndarray:
    """Matern covariance, once differentiable: kernels switch, so nothing smoother fits."""
    scaled = (one[:, None, :] - other[None, :, :]) / np.array(lengths)
    distance = math.sqrt(3) * np.sqrt((scaled**2).sum(-1))
    return np.asarray(signal**2 * (1 + distance) * np.exp(-distance))


def _solve(factor: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.solve(factor.T, np.linalg.solve(factor, values)))


def _fit_process(
    inputs: np.ndarray, rest: np.ndarray, own_noise: np.ndarray, near: FamilyFit | None
) -> tuple[tuple[float, ...], float, float]:
    """Lengths, signal and noise of largest posterior likelihood, by coordinate steps."""
    size = inputs.shape[1]
    spread = float(np.std(rest)) if len(rest) > 1 else 0.1
    start = np.log([*[3.0] * size, min(max(spread, 0.05), _MOST_SIGNAL), 0.03])
    low = np.log([*[_LENGTHS[0]] * size, _LEAST_SIGNAL, _LEAST_NOISE])
    high = np.log([*[_LENGTHS[1]] * size, _MOST_SIGNAL, 0.3])

    def score(theta: np.ndarray) -> float:
        *lengths, signal, noise = np.exp(theta)
        covariance = _kernel(inputs, inputs, tuple(lengths), signal)
        covariance += np.diag(noise**2 + own_noise**2)
        factor = np.linalg.cholesky(covariance)
        half = np.linalg.solve(factor, rest)
        fits = -0.5 * float(half @ half) - float(np.log(np.diag(factor)).sum())
        # A weak belief in smooth surfaces and little noise, which decides when points are few.
        belief = ((theta - start) / np.array([*[0.8] * size, 1.0, 0.7])) ** 2
        return fits - 0.5 * float(belief.sum())

    theta, step = np.clip(start, low, high), 0.7
    if near is not None:
        theta, step = np.log([*near.lengths, near.signal, near.noise]), 0.35
    best = score(theta)
    while step > 0.1:
        moved = False
        for at in range(len(theta)):
            for sign in (step, -step):
                tried = theta.copy()
                tried[at] = np.clip(tried[at] + sign, low[at], high[at])
                if (found := score(tried)) > best + 1e-6:
                    theta, best, moved = tried, found, True
                    break
        if not moved:
            step /= 2
    *lengths, signal, noise = (float(v) for v in np.exp(theta))
    return tuple(lengths), signal, noise


def point_noise(spread: float, is_quiet: bool) -> float:
    """The standard error of a timing, from the spread of its rounds and how quiet it was."""
    return math.hypot(min(0.5 * spread, 0.3), 0.0 if is_quiet else _BUSY_NOISE)
