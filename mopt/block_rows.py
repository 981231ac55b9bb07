"""A causal transformer block, computed for some rows of its sequence: traced once for any length.

Own rows need the keys and values of the rows before them, and nothing else of these.
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

from mopt.errors import CaptureError, first_line

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_OWN, _PAST = "own", "past"
_Step = tuple[fx.Node, str]


@dataclass
class Rows:
    """The rows that are computed, ``begin`` to ``end`` of the sequence."""

    begin: int
    end: int


class BlockRows:
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
        self, steps: Sequence[_Step], wanted: Sequence[fx.Node], rows: Rows,
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

    def cut(self, node: fx.Node, value: Tensor, rows: Rows) -> Tensor:
        return value.narrow(self.along(node), rows.begin, rows.end - rows.begin)

    def _attend(
        self, node: fx.Node, rows: Rows, take: Callable[[fx.Node], Any],
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
