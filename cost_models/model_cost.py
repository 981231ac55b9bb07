"""What one run of a whole model costs: the sum over the operators that the runtime executes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Protocol

from mopt.cost import Cost, ModelCost, NodeCost, Work, combine
from mopt.cost_models.executed import ExecutedModel, ExecutedNode, executed_model
from mopt.cost_models.families import families
from mopt.cost_models.node_work import operation_of
from mopt.device_calibration import CallOverhead, Handover

# A weight's name starts with the path of the layer it belongs to.
_WEIGHT = re.compile(r"(.+)\.(weight|bias|weight_ih|weight_hh)[^.]*")


class _Costs(Protocol):
    def cost(self, work: Work) -> Cost: ...


def model_cost(
    costs: _Costs,
    model: str | PathLike[str],
    inputs: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    call: CallOverhead | None = None,
    handover: Handover | None = None,
) -> ModelCost:
    """See ``mopt.cost.CostModel.model_cost``; ``costs`` knows single operators."""
    executed = executed_model(model, inputs, sizes)
    return executed_cost(costs, executed, call or CallOverhead(), handover or Handover())


def executed_cost(
    costs: _Costs, executed: ExecutedModel, call: CallOverhead, handover: Handover
) -> ModelCost:
    """The cost of operators that are known already, with what handing values over takes."""
    nodes, unknown = [], set()
    for node in executed.nodes:
        work = node_work(node)
        if work.kind == "other" and not work.variant:
            unknown.add(node.operator)
        cost = costs.cost(work)
        cost = replace(cost, milliseconds=cost.milliseconds + handover.milliseconds(work))
        nodes.append(NodeCost(node.name, work, cost))
    overhead = call.milliseconds(len(executed.input_bytes), sum(executed.output_bytes))
    whole = combine([*(node.cost for node in nodes), Cost(overhead, 0.2, 0.0, "calibrated")])
    return ModelCost(whole, tuple(nodes), overhead, None, tuple(sorted(unknown)))


def node_work(node: ExecutedNode) -> Work:
    """The work of one executed operator; without a ``variant`` where only its bytes are known."""
    operation = operation_of(node)
    path = layer_path(node)
    if operation.family == "":
        return Work("free", 0.0, 0.0, 0.0, path=path, operator=node.operator)
    family = families().get(operation.family or "")
    if family is None:
        moved = sum(v.bytes for v in (*node.inputs, *node.outputs) if v is not None)
        count = node.outputs[0].count
        return Work(
            "other", float(count), 0.0, moved, "fp32", path, 1, (count,), node.operator
        )  # fmt: skip
    amount = family.amount(operation.dims)
    return Work(
        family.kind, amount.flops, amount.weight_bytes, amount.activation_bytes,
        family.weight_format, path, operation.dims[0], operation.dims, node.operator, family.name,
    )  # fmt: skip


def layer_path(node: ExecutedNode) -> str:
    """The path of the layer whose weight an operator reads, "" if it reads none."""
    names = [value.weight for value in node.weights]
    # Equal biases are stored once, under the name of the first: a weight is the better witness.
    for name in sorted(names, key=lambda n: ".weight" not in n):
        if match := _WEIGHT.fullmatch(name):
            return match[1]
    return ""
