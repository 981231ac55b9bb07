"""Store the tables of embeddings in int8."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopt.formats import Format
from mopt.formats.int_rows import ROW_GROUPS, Int8Row
from mopt.layers import Layer
from mopt.pass_base import Numerics, Pass, PassContext, PassResult, option, register_pass
from mopt.passes.quantize._weights import encode_layers, is_small
from mopt.program import Program, module_path


@register_pass("quantize-embeddings", numerics=Numerics.LOSSY)
@dataclass(frozen=True, kw_only=True)
class QuantizeEmbeddings(Pass):
    """Store the tables of embeddings in int8.

    ## When to use
    Whenever a table is a visible part of the model: it becomes a quarter of its size, and looking
    up a row reads a quarter of the bytes.

    ## Accuracy
    Symmetric int8 with a scale per row, or per `group` values of it: the squared error is below
    0.01 percent of the table's.

    ## Limits
    A table that a float layer also reads is left alone, because the int8 copy would come on top of
    it. A table whose output head is int8 per row already shares the head's codes.

    ## Example
    A table of 30522 x 384 in float32 (47 MB) becomes 11.8 MB.
    """

    group: int = option(
        0, choices=(0, *ROW_GROUPS), help="values of a row that share a scale; 0: the whole row"
    )
    ranges: str = option("mse", choices=("mse", "min-max"), help="how scales are chosen")
    min_size: int = option(4096, min=0, help="leave tables with fewer values alone")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        def choose(layer: Layer, weight: Tensor) -> Format | str:
            return (
                is_small(layer, self.min_size) or _float_reader(program, layer)
                or Int8Row(self.group)
            )  # fmt: skip

        return encode_layers(self, program, ctx, ("embedding",), choose, self.ranges)


def _float_reader(program: Program, layer: Layer) -> str | None:
    calls = set(layer.calls)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == layer.weight.target:
            others = [user for user in node.users if user not in calls]
            if others:
                path = module_path(others[0]) or others[0].name
                return f"{path!r} reads the table in float too: quantize that layer first"
    return None
