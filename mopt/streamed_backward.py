"""Backward of causal transformer blocks in pieces of the sequence: exact, for long sequences.

StreamBP (Luo et al., NeurIPS 2025): a block keeps its input only. Its backward runs one piece of
rows after another; each piece computes what it needs again for its own rows, and for the rows
before it only the keys and values, which are computed once for all pieces. Gradients of rows, keys,
values and weights add up over the pieces: the chain rule is linear in the gradient that arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mopt.errors import CaptureError, InputError, first_line

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_TOLERANCE = 1e-4
_OWN, _PAST = "own", "past"
_Step = tuple[fx.Node, str]


@dataclass
class _Rows:
    """The rows that are computed, ``begin`` to ``end`` of the sequence."""

    begin: int
    end: int


class _Block:
    """A block's graph, run for some rows.

    ``border`` are the values of other rows that it reads: keys and values (``wanted``), positions.
    """

    def __init__(self, block: nn.Module, arguments: Sequence[Any], dim: int) -> None:
        self.block, self.dim = block, dim
        length = arguments[0].shape[dim]
        rows = Dim("rows", min=2)
        shapes = [
            {i: rows for i, n in enumerate(a.shape) if n == length}
            if isinstance(a, Tensor)
            else None
            for a in arguments
        ]
        try:
            program = export(_Only(block), tuple(arguments), dynamic_shapes=(tuple(shapes),))
        except (
            RuntimeError,
            ValueError,
            TypeError,
            torch._dynamo.exc.TorchDynamoException,
        ) as error:
            raise CaptureError(
                f"a block could not be traced for any length: {first_line(error)}",
                code="stream-capture",
            ) from error
        self.traced = program.module()
        graph = self.traced.graph
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        (self.output,) = graph.output_node().all_input_nodes
        self.symbol = str(self.inputs[0].meta["val"].shape[dim])
        self.own: list[_Step] = []
        self.past: list[_Step] = []
        self.keys: list[_Step] = []
        self.border: list[fx.Node] = []
        self.wanted: list[fx.Node] = []
        self._order()
        self.parameters = [p for p in block.parameters() if p.requires_grad]

    def axis(self, node: fx.Node) -> int | None:
        """The dimension of a value that runs along the sequence; None: it has none."""
        parts = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        if not parts:
            return None
        # The parts of a list that a call gives run along the sequence alike.
        value = parts[0]
        found = [i for i, n in enumerate(value.shape) if self.symbol in str(n)]
        if len(found) > 1:
            raise CaptureError(
                f"{node.name} has two dimensions along the sequence: only causal attention by "
                "scaled_dot_product_attention may relate rows",
                code="stream-mixes-rows",
            )
        return found[0] if found else None

    def along(self, node: fx.Node) -> int:
        """The dimension of a value of rows that runs along the sequence."""
        found = self.axis(node)
        assert found is not None
        return found

    def _order(self) -> None:
        """The calls for a piece's output, those for its keys and values, and those for all rows."""
        seen: set[tuple[fx.Node, int]] = set()

        def visit(node: fx.Node, into: list[_Step]) -> None:
            mode = _PAST if into is self.past else _OWN
            if mode == _OWN and self._of_rows_only(node):
                read(node)
                return
            if (node, id(into)) in seen:
                return
            seen.add((node, id(into)))
            self._check(node)
            for source in node.all_input_nodes:
                if node.target is _ATTENTION and source in node.args[1:3]:
                    if mode == _PAST:
                        raise CaptureError(
                            f"{node.name} is not the block's only attention",
                            code="stream-mixes-rows", hint="name smaller blocks",
                        )  # fmt: skip
                    read(source)
                else:
                    visit(source, into)
            into.append((node, mode))

        def read(node: fx.Node) -> None:
            if node not in self.border:
                self.border.append(node)
                visit(node, self.past)
                if not self._of_rows_only(node):
                    self.wanted.append(node)

        visit(self.output, self.own)
        for node in self.wanted:
            visit(node, self.keys)

    def _of_rows_only(self, node: fx.Node) -> bool:
        """Whether a value is made of the number of rows alone, such as positions."""
        if node.op != "call_function" or self.axis(node) is None:
            return False
        return not any(self.axis(source) is not None for source in node.all_input_nodes)

    def _check(self, node: fx.Node) -> None:
        self.axis(node)
        if node.target is _ATTENTION:
            masked = len(node.args) > 3 and node.args[3] is not None
            causal = node.kwargs.get("is_causal", len(node.args) > 5 and node.args[5])
            dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
            if masked or node.kwargs.get("attn_mask") is not None or not causal or dropout:
                raise CaptureError(
                    f"{node.name} is not plain causal attention (is_causal=True, no mask, no "
                    "dropout)", code="stream-mixes-rows",
                )  # fmt: skip
        elif isinstance(node.target, torch._ops.OpOverload):
            random = torch.Tag.nondeterministic_seeded in node.target.tags
            if random and not (node.target is torch.ops.aten.dropout.default and not node.args[2]):
                raise CaptureError(
                    f"{node.name} draws random numbers, which pieces would draw in another order",
                    code="stream-random", hint="set dropout to 0",
                )  # fmt: skip

    def run(
        self, steps: Sequence[_Step], wanted: Sequence[fx.Node], rows: _Rows,
        arguments: Sequence[Any], known: dict[fx.Node, Tensor],
    ) -> list[Any]:  # fmt: skip
        """Values of ``wanted`` for some rows; ``known`` are those of the rows up to their end."""
        values: dict[fx.Node, Any] = dict(zip(self.inputs, arguments, strict=True))
        uses: dict[fx.Node, int] = {}
        for node, _ in steps:
            for source in node.all_input_nodes:
                uses[source] = uses.get(source, 0) + 1
        for node in wanted:
            uses[node] = uses.get(node, 0) + 1

        def take(source: fx.Node) -> Any:
            return values[source]

        for node, mode in steps:
            if node.op == "call_function":
                if mode == _OWN and node.target is _ATTENTION:
                    values[node] = self._attend(node, rows, take, known)
                else:
                    for source in node.all_input_nodes:
                        if mode == _OWN and source in known:
                            values[source] = self.cut(source, known[source], rows)
                    given: Any = fx.map_arg((node.args, node.kwargs), take)
                    call: Any = node.target
                    values[node] = call(*given[0], **given[1])
            elif node.op == "get_attr":
                values[node] = self._weight(str(node.target))
            for source in node.all_input_nodes:
                uses[source] -= 1
                if not uses[source]:
                    values.pop(source, None)
        return [values[node] for node in wanted]

    def cut(self, node: fx.Node, value: Tensor, rows: _Rows) -> Tensor:
        return value.narrow(self.along(node), rows.begin, rows.end - rows.begin)

    def _attend(
        self, node: fx.Node, rows: _Rows, take: Callable[[fx.Node], Any],
        known: dict[fx.Node, Tensor],
    ) -> Tensor:  # fmt: skip
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        more = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        q = take(query)
        if rows.begin == 0:
            return F.scaled_dot_product_attention(
                q, known[key], known[value], is_causal=True, **more
            )
        count = rows.end - rows.begin
        # The mask's last row sees all keys; is_causal would let the first row see one.
        mask = torch.ones(count, rows.end, dtype=torch.bool, device=q.device).tril(rows.begin)
        return F.scaled_dot_product_attention(q, known[key], known[value], attn_mask=mask, **more)

    def _weight(self, name: str) -> Any:
        # The block's own weights, as they are now; constants that tracing made are its graph's.
        inside = name.startswith("block.")
        path, _, last = name.removeprefix("block.").rpartition(".")
        return getattr((self.block if inside else self.traced).get_submodule(path), last)


class _Only(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> Any:
        """What the block gives."""
        return self.block(*arguments)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: _Block, pieces: int, count: int, *rest: Any) -> Tensor:
        arguments = rest[:count]
        ctx.block, ctx.pieces, ctx.rest = block, pieces, arguments[1:]
        ctx.save_for_backward(arguments[0])
        x = arguments[0]
        length = x.shape[block.dim]
        whole = _Rows(0, length)
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
        border = block.run(block.past, block.border, _Rows(0, length), arguments, {})
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


def _pieces(length: int, pieces: int) -> list[_Rows]:
    width = -(-length // pieces)
    return [_Rows(i, min(length, i + width)) for i in range(0, length, width)]


def _slice(block: _Block, arguments: Sequence[Any], rows: _Rows) -> tuple[Any, ...]:
    return tuple(
        a if block.axis(n) is None else block.cut(n, a, rows)
        for n, a in zip(block.inputs, arguments, strict=True)
    )


def _up_to(block: _Block, border: Sequence[Tensor], end: int) -> dict[fx.Node, Tensor]:
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
    for block in chosen:
        arguments = seen.get(block)
        if not arguments:
            raise InputError("a block gets no positional input", code="stream-blocks")
        if any(isinstance(a, Tensor) and a.requires_grad for a in arguments[1:]):
            raise InputError("only a block's first input may need a gradient", code="stream-blocks")
        streamed = _Block(block, arguments, dim)
        _compare(block, streamed, arguments, pieces)
        own: Any = block
        own.forward = _forward(streamed, pieces)
    return chosen


def _forward(block: _Block, pieces: int) -> Callable[..., Tensor]:
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


def _compare(block: nn.Module, streamed: _Block, arguments: Sequence[Any], pieces: int) -> None:
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
