"""One training step within a memory budget, for people who do not use torch.compile themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from mopt.early_update import Updater
from mopt.errors import InputError, MoptError, UsageError
from mopt.frontend import normalize_inputs
from mopt.optimizer_state import state_bytes
from mopt.registry import find_training_backend
from mopt.reversible import INVERSE
from mopt.saved_codecs import LOSSY
from mopt.training import GraphPlan, TrainingOptions, TrainingSession

Loss = Callable[..., Tensor]


class _Step(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, args: Any, kwargs: Any, rest: Any) -> Tensor:
        return self.loss(self.model(*args, **kwargs), *rest)


@dataclass(frozen=True)
class GradientError:
    """How far a lossy plan's gradients are from the exact ones on a batch.

    ``relative`` is the norm of the difference by the norm of the exact gradient, all parameters
    together; ``cosine`` the cosine of the two; ``worst`` the parameter with the largest relative
    error of its own.
    """

    relative: float
    cosine: float
    worst: str


class TrainingStep:
    """Call it with a batch: forward, backward and, where an optimizer was given, the update.

    Returns the loss, detached. ``model`` is the model that was given, trained in place; ``plans``
    says what is kept, compressed and computed again; ``gradient_error`` is None for exact plans.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, options: TrainingOptions, optimizer: Any
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.gradient_error: GradientError | None = None
        self._step = _Step(model, loss)
        self._session = TrainingSession(options)
        compile_graph = find_training_backend()

        def backend(module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
            return compile_graph(self._session, module, inputs)

        # A plan is for one size of batch; sizes that vary would also keep smaller forms out.
        # Gradients of a parameter in two graphs would have to meet before an update.
        self._at_once = options.update_at_once
        self._run = torch.compile(
            self._step, backend=backend, dynamic=False, fullgraph=self._at_once
        )
        self._session.updater = self._updater = Updater(optimizer)

    @property
    def plans(self) -> list[GraphPlan]:
        """The plan of each graph of the model."""
        return self._session.plans

    def __call__(self, *batch: Any) -> Tensor:
        if self._at_once:
            # Backward updates; only the optimizer's parameters have no gradient left.
            loss: Tensor = self._run(*_parts(batch))
            loss.backward()
            return loss.detach()
        found = self.backward(*batch)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found

    def backward(self, *batch: Any) -> Tensor:
        """Forward and backward only: gradients add up in ``.grad``, as always.

        Raises UsageError (``training-option``) with ``update_at_once``: backward updates then.
        """
        if self._at_once:
            raise UsageError(
                "update_at_once leaves no gradients behind", code="training-option",
                hint="call the step itself, or plan without update_at_once",
            )  # fmt: skip
        loss: Tensor = self._run(*_parts(batch))
        loss.backward()
        return loss.detach()

    def prepare(self, batch: Sequence[Any]) -> None:
        """Make the plan on a batch, and measure lossy gradients; the model stays as it was."""
        lossy = self._session.options.allow != "exact"
        with _unchanged(self.model):
            found = self._gradients(self._run, batch)
            if lossy and _approximate(self.plans):
                self.gradient_error = _error(self._gradients(self._step, batch), found)

    def _gradients(self, run: Callable[..., Tensor], batch: Sequence[Any]) -> dict[str, Tensor]:
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        devices = {p.device.index for p in named.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(d or 0 for d in devices)):
            torch.manual_seed(0)
            early: dict[nn.Parameter, Tensor] = {}
            self._updater.collect = early
            try:
                found = torch.autograd.grad(
                    run(*_parts(batch)), list(named.values()), allow_unused=True
                )
            finally:
                self._updater.collect = None
        pairs = ((n, early.get(p, g)) for (n, p), g in zip(named.items(), found, strict=True))
        return {n: g for n, g in pairs if g is not None}


def fit(
    model: nn.Module,
    loss: Loss,
    example_batch: Sequence[Any],
    *,
    memory_budget: int | str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> TrainingStep:
    """A function that trains ``model`` by one batch and stays within a memory budget.

    ``example_batch`` is what it will be called with: the model's inputs (a tensor, a tuple or a
    mapping), then what ``loss(output, ...)`` takes besides the output. ``memory_budget`` bounds the
    peak with weights, inputs, gradients and the optimizer's state, as bytes or as a share of the
    activations; ``options`` are further fields of ``mopt.training.TrainingOptions``. The plan is
    made at once, on the example batch; the model is left as it was.

    Raises BudgetNotMet (``memory-budget-too-small``) with the least budget that can be met.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of the model requires a gradient", code="nothing-to-train")
    if options.get("update_at_once") and optimizer is None:
        raise UsageError("update_at_once needs an optimizer", code="training-option")
    if optimizer is not None:
        options = {"other_bytes": state_bytes(optimizer), **options}
    step = TrainingStep(
        model, loss, TrainingOptions.of({"memory_budget": memory_budget, **options}), optimizer
    )
    try:
        step.prepare(example_batch)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MoptError):
            raise error.inner_exception from None
        raise
    return step


def _parts(batch: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    if not batch:
        raise InputError(
            "a batch is the model's inputs and what the loss takes", code="bad-example-inputs"
        )
    args, kwargs = normalize_inputs(batch[0])
    return args, kwargs, tuple(batch[1:])


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back buffers, such as the averages of batch norm."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _approximate(plans: Sequence[GraphPlan]) -> bool:
    """Whether a plan has a value again that is not the value bit for bit."""
    forms = {
        done.problem.forward[index].form for done in plans for index in done.plan.repeats()
    }  # fmt: skip
    return any(form.startswith((*LOSSY, INVERSE)) for form in forms)


def _error(exact: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> GradientError:
    far = {n: float((found[n] - g).norm() / g.norm().clamp_min(1e-30)) for n, g in exact.items()}
    # Sums of millions of float32 products are off by more than an error is worth showing.
    pairs = [(g.flatten().double(), found[n].flatten().double()) for n, g in exact.items()]
    product = sum(float(one @ two) for one, two in pairs)
    apart = sum(float((two - one).square().sum()) for one, two in pairs)
    lengths = [math.sqrt(sum(float(pair[i] @ pair[i]) for pair in pairs)) for i in (0, 1)]
    cosine = product / max(lengths[0] * lengths[1], 1e-60)
    return GradientError(
        math.sqrt(apart) / max(lengths[0], 1e-30),
        min(max(cosine, -1.0), 1.0),
        max(far, key=far.__getitem__),
    )
