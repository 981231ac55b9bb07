"""Planning a training step without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mopt.errors import CaptureError, InputError, MoptError, first_line
from mopt.frontend import normalize_inputs
from mopt.training import GraphPlan, TrainingOptions, TrainingSession

LOSSES = ("auto", "cross-entropy", "mean-square")


class _Planned(Exception):
    """Ends the compilation once there is a plan."""


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the model's first floating-point output, with made-up targets."""
        leaves = pytree.tree_leaves(self.model(*args, **kwargs))
        value = next(v for v in leaves if isinstance(v, Tensor) and v.is_floating_point())
        if self.loss == "mean-square" or (self.loss == "auto" and value.dim() not in (2, 3)):
            return value.float().square().mean()
        rows = value.flatten(0, -2)
        return F.cross_entropy(rows, rows.new_zeros(rows.shape[0], dtype=torch.long))


def plan_training(
    model: nn.Module, example_inputs: Any, options: TrainingOptions, *, loss: str = "auto"
) -> GraphPlan:
    """The plan of one training step on the example inputs, as ``torch.compile`` would get it.

    ``loss`` is put on the model's first floating-point output: ``auto`` is cross-entropy over the
    last dimension of outputs with two or three dimensions, else the mean square. The model is
    planned in training mode and left as it was. Raises BudgetNotMet (``memory-budget-too-small``),
    CaptureError (``training-capture``) for a model that cannot be traced in one piece, and
    InputError (``nothing-to-train``).
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of the model requires a gradient", code="nothing-to-train")
    args, kwargs = normalize_inputs(example_inputs)
    session = TrainingSession(options)

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
            session.prepare(module)
            return trace(module, inputs)  # type: ignore[no-any-return]

        torch.compile(_WithLoss(model, loss), backend=backend, fullgraph=True, dynamic=False)(
            *args, **kwargs
        )
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, MoptError):
            raise inner from None
        if not isinstance(inner, _Planned):
            raise _not_traced(inner) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise _not_traced(error) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return session.plans[0]


def _not_reached(module: fx.GraphModule, _inputs: Any) -> Any:
    return module.forward


def _not_traced(error: BaseException) -> CaptureError:
    return CaptureError(
        f"the training step could not be traced in one piece: {first_line(error)}",
        code="training-capture",
        hint='torch.compile(model, backend="mopt") takes models that break into several graphs',
    )
