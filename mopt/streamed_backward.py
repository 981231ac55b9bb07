"""Backward of causal transformer blocks in pieces of the sequence: exact, for long sequences.

StreamBP (Luo et al., NeurIPS 2025): a block keeps its input only. Its backward runs one piece of
rows after another; each piece computes what it needs again for its own rows, and for the rows
before it only the keys and values, which are computed once for all pieces. Gradients of rows, keys,
values and weights add up over the pieces: the chain rule is linear in the gradient that arrives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mopt.block_rows import BlockRows, Rows
from mopt.errors import CaptureError, InputError

_TOLERANCE = 1e-4


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: BlockRows, pieces: int, count: int, *rest: Any) -> Tensor:
        arguments = rest[:count]
        ctx.block, ctx.pieces, ctx.rest = block, pieces, arguments[1:]
        ctx.save_for_backward(arguments[0])
        x = arguments[0]
        length = x.shape[block.dim]
        whole = Rows(0, length)
        border = block.run(block.past, block.border, whole, arguments, {})
        found = []
        for rows in _pieces(length, pieces):
            known = _up_to(block, border, rows.end)
            found += block.run(
                block.own, [block.output], rows, _slice(block, arguments, rows), known
            )
        return torch.cat(found, block.dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        block, (x,) = ctx.block, ctx.saved_tensors
        length, dim, weights = x.shape[block.dim], block.dim, block.parameters
        arguments = (x.detach(), *ctx.rest)
        border = block.run(block.past, block.border, Rows(0, length), arguments, {})
        to_keys = {
            n: torch.zeros_like(v)
            for n, v in zip(block.border, border, strict=True) if n in block.wanted
        }  # fmt: skip
        to_x = torch.empty_like(x)
        to_weights: list[Tensor | None] = [None] * len(weights)
        # Later rows read the keys of earlier ones: from the last piece on, a piece's keys have all
        # of their gradient once the piece is done.
        for rows in reversed(_pieces(length, ctx.pieces)):
            known = {
                n: v.detach().requires_grad_(n in to_keys)
                for n, v in _up_to(block, border, rows.end).items()
            }
            own = _slice(block, arguments, rows)
            leaf = own[0].detach().requires_grad_()
            own = (leaf, *own[1:])
            keys = list(to_keys)
            with torch.enable_grad():
                (out,) = block.run(block.own, [block.output], rows, own, known)
            part = gradient.narrow(dim, rows.begin, rows.end - rows.begin)
            sources = [leaf, *(known[n] for n in keys), *weights]
            found = torch.autograd.grad(out, sources, part, allow_unused=True)
            del out
            for n, one in zip(keys, found[1:], strict=False):
                if one is not None:
                    to_keys[n].narrow(block.along(n), 0, rows.end).add_(one)
            place = to_x.narrow(dim, rows.begin, rows.end - rows.begin)
            place.zero_() if found[0] is None else place.copy_(found[0])
            _add(to_weights, found[1 + len(keys) :])
            del found
            if keys:
                with torch.enable_grad():
                    others = {n: v for n, v in known.items() if n not in to_keys}
                    made = block.run(block.keys, keys, rows, own, others)
                parts = [block.cut(n, g, rows) for n, g in to_keys.items()]
                found = torch.autograd.grad(made, [leaf, *weights], parts, allow_unused=True)
                if found[0] is not None:
                    place.add_(found[0])
                _add(to_weights, found[1:])
                del made, found
        return (None, None, None, to_x, *([None] * len(ctx.rest)), *to_weights)


def _add(totals: list[Tensor | None], found: Sequence[Tensor | None]) -> None:
    for i, one in enumerate(found):
        total = totals[i]
        if one is not None:
            totals[i] = one if total is None else total.add_(one)


def _pieces(length: int, pieces: int) -> list[Rows]:
    width = -(-length // pieces)
    return [Rows(i, min(length, i + width)) for i in range(0, length, width)]


def _slice(block: BlockRows, arguments: Sequence[Any], rows: Rows) -> tuple[Any, ...]:
    return tuple(
        a if block.axis(n) is None else block.cut(n, a, rows)
        for n, a in zip(block.inputs, arguments, strict=True)
    )


def _up_to(block: BlockRows, border: Sequence[Tensor], end: int) -> dict[fx.Node, Tensor]:
    return {
        node: value.narrow(block.along(node), 0, end)
        for node, value in zip(block.border, border, strict=True)
    }


def stream_blocks(
    model: nn.Module,
    example_inputs: Any,
    *,
    blocks: Sequence[nn.Module] | None = None,
    pieces: int = 8,
    dim: int = 1,
) -> list[nn.Module]:
    """Run the blocks of a causal transformer with a backward in ``pieces``; returns the blocks.

    ``blocks`` are modules that turn their first argument, rows along ``dim``, into rows of the same
    shape; without it, the members of the model's largest list of equal modules. Each block keeps
    its input between forward and backward. The blocks stay where they are, with their names;
    ``del block.forward`` undoes it. Every block is traced for any length and compared with itself,
    gradients included, on what it gets from ``example_inputs``. Rows may meet in causal
    ``scaled_dot_product_attention`` only, and there is no dropout.

    Raises CaptureError (``stream-capture``, ``stream-mixes-rows``, ``stream-random``).
    """
    chosen = list(repeated_blocks(model) if blocks is None else blocks)
    seen: dict[nn.Module, tuple[Any, ...]] = {}
    hooks = [
        b.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args) and None)
        for b in chosen
    ]
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with torch.no_grad():
        model(*args)
    for hook in hooks:
        hook.remove()
    traces: list[BlockRows] = []
    for block in chosen:
        arguments = seen.get(block)
        if not arguments:
            raise InputError("a block gets no positional input", code="stream-blocks")
        if any(isinstance(a, Tensor) and a.requires_grad for a in arguments[1:]):
            raise InputError("only a block's first input may need a gradient", code="stream-blocks")
        streamed = _of_another(block, traces, arguments, pieces)
        if streamed is None:
            streamed = BlockRows(block, arguments, dim)
            _compare(block, streamed, arguments, pieces)
            traces.append(streamed)
        own: Any = block
        own.forward = _forward(streamed, pieces)
    return chosen


def _of_another(
    block: nn.Module, traces: Sequence[BlockRows], arguments: Sequence[Any], pieces: int
) -> BlockRows | None:
    """The trace of an equal block with this one's weights; None where there is none that fits."""

    def kind(one: nn.Module) -> object:
        return type(one), [(n, t.shape, t.dtype) for n, t in one.state_dict().items()]

    for trace in traces:
        if kind(trace.block) == kind(block):
            found = copy.copy(trace)
            found.block = block
            found.parameters = [p for p in block.parameters() if p.requires_grad]
            try:
                _compare(block, found, arguments, pieces)
            except CaptureError:
                continue  # equal weights, but another computation
            return found
    return None


def _forward(block: BlockRows, pieces: int) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        found: Tensor = _Streamed.apply(
            block, pieces, len(arguments), *arguments, *block.parameters
        )
        return found

    return run


def repeated_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The members of the model's largest list of modules of one class.

    Raises InputError (``no-blocks``) where it has none.
    """
    lists = [
        list(m) for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(b) for b in m}) == 1
    ]  # fmt: skip
    if not lists:
        raise InputError("the model has no list of equal blocks", code="no-blocks")
    return max(lists, key=lambda b: sum(p.numel() for m in b for p in m.parameters()))


def _compare(block: nn.Module, streamed: BlockRows, arguments: Sequence[Any], pieces: int) -> None:
    """Raise where rows meet in a way that the trace does not show."""
    first = arguments[0].detach()
    found = []
    for run in (block, _forward(streamed, pieces)):
        leaf = first.clone().requires_grad_()
        out = run(leaf, *arguments[1:])
        weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
        loss = (out * weight.view(out.shape)).sum()
        found.append([out, *torch.autograd.grad(loss, [leaf, *streamed.parameters],
                                                allow_unused=True)])  # fmt: skip
    for one, two in zip(*found, strict=True):
        if one is None and two is None:
            continue
        far = (
            float((one - two).detach().abs().max()) if one is not None and two is not None else 1.0
        )
        top = max(float(v.detach().abs().max()) for v in found[0] if v is not None)
        if far > _TOLERANCE * max(top, 1e-30):
            raise CaptureError(
                f"rows of {type(block).__name__} meet outside of causal attention: in pieces its "
                f"results differ by {far:.2g}",
                code="stream-mixes-rows",
            )
