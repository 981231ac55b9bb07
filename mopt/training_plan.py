"""Planning a training step without running it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mopt.call_cost import Measured
from mopt.errors import BudgetNotMet, CaptureError, InputError, MoptError, first_line
from mopt.frontend import check_runs, normalize_inputs
from mopt.training import GraphPlan, TrainingOptions, TrainingSession

LOSSES = ("auto", "cross-entropy", "mean-square")


class _Planned(Exception):
    """Ends the compilation once there is a plan."""


class WithLoss(nn.Module):
    """A model with a loss of ``LOSSES`` on its first floating-point output."""

    def __init__(self, model: nn.Module, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the model's first floating-point output, with made-up targets."""
        value = _first_floating(self.model(*args, **kwargs))
        if self.loss == "mean-square" or (self.loss == "auto" and value.dim() not in (2, 3)):
            return value.float().square().mean()
        # Targets without a use of the logits: a loss in pieces must be their only reader.
        target = torch.zeros(value.shape[:-1].numel(), dtype=torch.long, device=value.device)
        return F.cross_entropy(value.flatten(0, -2), target)


def _first_floating(output: Any) -> Tensor:
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InputError(
        "no output of the model is a floating-point tensor, which a loss could be put on",
        code="no-loss",
        hint="plan a module that returns its loss or its scores",
    )


# What makes a step smaller without approximating anything, in the order it is tried.
SAVINGS: tuple[tuple[str, ...], ...] = (
    (), ("chunk_loss",), ("update_at_once",), ("chunk_loss", "update_at_once"),
)  # fmt: skip


def plan_with_savings(
    model: nn.Module, example_inputs: Any, options: TrainingOptions, *, loss: str = "auto"
) -> tuple[GraphPlan, tuple[str, ...]]:
    """The plan of one training step, and which options had to be switched on for it.

    Where the budget cannot be met, exact savings are tried that a user has to agree to: the loss in
    pieces (another order of sums), and each update right after its gradient (no gradient is left
    to be looked at). Raises what ``plan_training`` raises, with the least peak of all.
    """
    failed: list[BudgetNotMet] = []
    measured = Measured()
    for names in SAVINGS:
        if any(getattr(options, name) for name in names):
            continue
        try:
            more: dict[str, Any] = dict.fromkeys(names, True)
            wider = replace(options, **more)
            found = plan_training(model, example_inputs, wider, loss=loss, measured=measured)
            return found, names
        except BudgetNotMet as error:
            failed.append(error)
    # All savings together need least.
    least = failed[-1]
    if len(failed) > 1:
        least.hint = f"{least.hint}. The loss in pieces and updates at once are in use here"
    raise least


def plan_training(
    model: nn.Module,
    example_inputs: Any,
    options: TrainingOptions,
    *,
    loss: str = "auto",
    measured: Measured | None = None,
) -> GraphPlan:
    """The plan of one training step on the example inputs, as ``torch.compile`` would get it.

    ``loss`` is put on the model's first floating-point output: ``auto`` is cross-entropy over the
    last dimension of outputs with two or three dimensions, else the mean square. ``measured`` holds
    prices of calls that are known already. The model is
    planned in training mode and left as it was. Raises BudgetNotMet (``memory-budget-too-small``),
    CaptureError (``training-capture``) for a model that cannot be traced in one piece, and
    InputError (``nothing-to-train``, ``no-loss``, or what ``check_runs`` raises for a model that
    does not run).
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of the model requires a gradient", code="nothing-to-train")
    args, kwargs = normalize_inputs(example_inputs)
    session = TrainingSession(options, measured)

    def partition(
        module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        session.plan(module, num_fwd_outputs)
        raise _Planned

    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        trace = aot_autograd(fw_compiler=_not_reached, partition_fn=partition)

        def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            session.prepare(module, inputs)
            return trace(module, inputs)  # type: ignore[no-any-return]

        step = torch.compile(WithLoss(model, loss), backend=backend, fullgraph=True, dynamic=False)
        with _without_log():
            step(*args, **kwargs)
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, MoptError):
            raise inner from None
        if not isinstance(inner, _Planned):
            raise _not_traced(inner) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        # The model's own mistakes are told by the model itself.
        model.eval()
        check_runs(model, args, kwargs)
        with torch.no_grad():
            _first_floating(model(*args, **kwargs))
        raise _not_traced(error) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return session.plans[0]


@contextmanager
def _without_log() -> Iterator[None]:
    """PyTorch logs a model's mistake with all its frames before raising it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _not_reached(module: fx.GraphModule, _inputs: Any) -> Any:
    return module.forward


def _not_traced(error: BaseException) -> CaptureError:
    return CaptureError(
        f"the training step could not be traced in one piece: {first_line(error)}",
        code="training-capture",
        hint='torch.compile(model, backend="mopt") takes models that break into several graphs',
    )
