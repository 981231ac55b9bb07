"""Cross-entropy of a linear layer's output, row by row in pieces: logits never exist as a whole.

``linear_cross_entropy`` is the operator; ``use_chunked_loss`` puts it into a graph that dynamo
traced, in place of a linear layer whose only use is a cross-entropy. Backward computes the logits
again, piece by piece, with the kept log-sum-exp of each row: exact up to the order of sums.

Importing this module registers the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

PIECES = 20
_VIEWS = ("view", "reshape", "flatten", "contiguous")
_LINEAR = (F.linear, torch._C._nn.linear)  # type: ignore[attr-defined]


def _rows(count: int) -> range:
    return range(0, count, max(1, -(-count // PIECES)))


@torch.library.custom_op("mopt::linear_cross_entropy", mutates_args=())
def _forward(x: Tensor, weight: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    sums = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    width = _rows(x.shape[0]).step
    for start in _rows(x.shape[0]):
        part = slice(start, start + width)
        logits = (x[part] @ weight.mT).float()
        sums[part] = logits.logsumexp(1)
        valid = target[part] != ignore
        own = logits.gather(1, target[part].where(valid, 0)[:, None])[:, 0]
        total += (sums[part] - own).where(valid, 0.0).sum()
    return (total / (target != ignore).sum()).to(x.dtype), sums


@_forward.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("mopt::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, sums: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    to_x, to_weight = torch.empty_like(x), torch.zeros_like(weight)
    factor = grad.float() / (target != ignore).sum()
    width = _rows(x.shape[0]).step
    for start in _rows(x.shape[0]):
        part = slice(start, start + width)
        shares = (x[part] @ weight.mT).float().sub_(sums[part, None]).exp_()
        valid = target[part] != ignore
        place = target[part].where(valid, 0)[:, None]
        shares.scatter_add_(1, place, -torch.ones_like(place, dtype=shares.dtype))
        shares *= factor * valid[:, None]
        shares = shares.to(x.dtype)
        to_x[part] = shares @ weight
        to_weight.addmm_(shares.mT, x[part])
    return to_x, to_weight


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, sums: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, target, ctx.ignore = inputs
    ctx.save_for_backward(x, weight, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _sums):  # type: ignore[no-untyped-def]
    to_x, to_weight = _backward(grad, *ctx.saved_tensors, ctx.ignore)
    return to_x, to_weight, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, ignore: int = -100) -> Tensor:
    """Mean cross-entropy of ``x @ weight.T`` with ``target``, without the logits.

    ``x`` is [rows, width], ``weight`` [classes, width], ``target`` [rows] of class numbers; rows
    whose target is ``ignore`` do not count. About 2 / 20 of the logits' bytes are alive at a time.
    """
    loss: Tensor = _forward(x, weight, target, ignore)[0]
    return loss


def use_chunked_loss(module: fx.GraphModule) -> int:
    """Replace each linear layer that only feeds a plain mean cross-entropy; returns how many.

    Left alone: layers with a bias, class weights, label smoothing, sums, targets of probabilities.
    """
    found = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not F.cross_entropy:
            continue
        logits, target = _arguments(node)
        linear = logits
        while linear is not None and linear.target not in _LINEAR:
            linear = _before(linear)
        if linear is None or target is None or len(linear.users) != 1:
            continue
        rows = logits.meta["example_value"] if logits is not None else None
        if rows is None or rows.dim() != 2 or target.meta["example_value"].dim() != 1:
            continue
        x, weight = linear.args[0], linear.args[1]
        if (len(linear.args) > 2 and linear.args[2] is not None) or linear.kwargs:
            continue
        with module.graph.inserting_before(node):
            flat = module.graph.call_method("reshape", (x, -1, _width(weight)))
            ignore = node.kwargs.get("ignore_index", -100)
            new = module.graph.call_function(linear_cross_entropy, (flat, weight, target, ignore))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        found += 1
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return found


def _width(weight: fx.Node) -> int:
    """The second size of a weight."""
    return int(weight.meta["example_value"].shape[1])


def _arguments(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The logits and the targets of a cross-entropy without further wishes."""
    given = {**dict(zip(("input", "target"), node.args, strict=False)), **node.kwargs}
    plain = {
        "weight": None, "size_average": None, "ignore_index": given.get("ignore_index", -100),
        "reduce": None, "reduction": "mean", "label_smoothing": 0.0,
    }  # fmt: skip
    logits, target = given.pop("input", None), given.pop("target", None)
    if len(node.args) > 2 or any(given[k] != plain.get(k) for k in given):
        return None, None
    if not isinstance(logits, fx.Node) or not isinstance(target, fx.Node):
        return None, None
    return logits, target


def _before(node: fx.Node) -> fx.Node | None:
    """What a view that nobody else reads is a view of."""
    if node.op == "call_method" and node.target in _VIEWS and len(node.users) == 1:
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None
