"""Optimizers of other packages, set up so that their state counts in a budget.

``low_bit_adamw`` is torchao's AdamW with states of 8 or 4 bits; ``MuonAdamW`` is torch's Muon for
the hidden matrices and AdamW for all else, as one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mopt.errors import InputError, UsageError


def low_bit_adamw(
    params: Any,
    lr: float = 1e-3,
    *,
    bits: int = 8,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    bf16_stochastic_round: bool = False,
) -> torch.optim.Optimizer:
    """torchao's AdamW whose moments take ``bits`` (8 or 4) a value: 2.03 or 1.06 bytes a parameter.

    Parameters with fewer than 4096 values, or not a multiple of the block of 256 or 128, keep float
    moments. torchao compiles its update with Inductor, which needs a C++ compiler. Raises
    UsageError ``missing-package`` without torchao.
    """
    if bits not in (8, 4):
        raise InputError(f"bits is {bits!r}", code="optimizer-option", hint="8 or 4")
    try:
        from torchao import optim
    except ImportError as error:
        raise UsageError(
            "AdamW with states of few bits needs the package 'torchao', which is not installed",
            code="missing-package",
            hint="pip install torchao, or take mopt.optim.FloatEightAdamW",
        ) from error
    made: torch.optim.Optimizer = getattr(optim, f"AdamW{bits}bit")(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        bf16_stochastic_round=bf16_stochastic_round,
    )  # fmt: skip
    return made


class MuonAdamW(torch.optim.Optimizer):
    """Muon for a model's hidden matrices, AdamW for embeddings, the output and what is no matrix.

    ``model`` gives the parameters: Muon gets those with two dimensions that belong to neither an
    embedding nor the last linear layer. ``lr`` is Muon's, matched to AdamW's step sizes,
    ``adamw_lr`` the other's (default: the same). State: 4 bytes a value for Muon's, 8 for the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        hidden, others = _split(model)
        if not hidden:
            raise InputError("the model has no hidden matrix for Muon", code="optimizer-option")
        self._muon = torch.optim.Muon(
            hidden, lr=lr, momentum=momentum, weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        inner: list[torch.optim.Optimizer] = [self._muon]
        if others:
            inner.append(torch.optim.AdamW(
                others, lr=lr if adamw_lr is None else adamw_lr, betas=betas,
                weight_decay=weight_decay,
            ))  # fmt: skip
        groups = [{**g, "kind": k} for k, one in enumerate(inner) for g in one.param_groups]
        super().__init__(groups, {})
        self._inner = inner
        for one in inner:
            one.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter with a gradient; returns the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, one in enumerate(self._inner):
            # This optimizer's groups and state are the ones: schedulers and checkpoints see them.
            one.param_groups = [g for g in self.param_groups if g["kind"] == kind]
            one.state = self.state
            one.step()
        return loss

    def state_bytes(self) -> int:
        """Bytes of all state after the first step."""
        return sum(
            (4 if group["kind"] == 0 else 8) * p.numel()
            for group in self.param_groups for p in group["params"]
        )  # fmt: skip


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    outside = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= {linears[-1].weight} if len(linears) > 1 else set()
    found: Iterable[Tensor] = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in found if p.dim() == 2 and p not in outside]
    return hidden, [p for p in found if p.dim() != 2 or p in outside]
