"""The update of each parameter right after its gradient, inside the backward graph.

A gradient then dies at once, as in the Tiny Training Engine (Lin et al., NeurIPS 2022, sec. 3.3);
plain PyTorch holds all of them until the optimizer's step. The update of a parameter stands behind
the last backward call that reads the parameter, so that no gradient sees a new value.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from mopt.joint_graph import Joint, tensors
from mopt.joint_tags import is_backward
from mopt.recompute import Item

_NUMBERS = itertools.count()
_UPDATERS: weakref.WeakValueDictionary[int, Updater] = weakref.WeakValueDictionary()


class Updater:
    """Steps an optimizer for one parameter at a time.

    With ``collect`` set, gradients go there instead, by parameter, and nothing is updated.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        self.collect: dict[nn.Parameter, Tensor] | None = None
        self.number = next(_NUMBERS)
        _UPDATERS[self.number] = self
        self._parameters: list[nn.Parameter] = []

    def place_of(self, parameter: nn.Parameter) -> int:
        """A number for ``apply``."""
        self._parameters.append(parameter)
        return len(self._parameters) - 1

    def apply(self, gradient: Tensor, place: int) -> None:
        """One step of the optimizer, for one parameter."""
        parameter = self._parameters[place]
        if self.collect is not None:
            self.collect[parameter] = gradient.clone()
            return
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        own = next(g for g in groups if any(p is parameter for p in g["params"]))
        parameter.grad = gradient
        self.optimizer.param_groups = [{**own, "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            parameter.grad = None


def update(gradient: Tensor, updater: int, place: int) -> None:
    """What stands in the graph behind a finished gradient."""
    _UPDATERS[updater].apply(gradient, place)


has_side_effect(update)


def write_updates(
    module: fx.GraphModule, num_outputs: int, inputs: Sequence[Any], updater: Updater
) -> int:
    """Put an update behind each parameter's gradient, which is no output then; returns how many.

    ``inputs`` are what the graph's placeholders stand for, in order: real parameters among them.
    """
    primals = [n for n in module.graph.nodes if n.op == "placeholder" and not is_backward(n)]
    output = module.graph.output_node()
    flat, spec = pytree.tree_flatten(output.args[0])
    gradients = flat[num_outputs:]
    owned = {
        p for group in updater.optimizer.param_groups for p in group["params"]
    } if updater.optimizer is not None else None  # fmt: skip
    found = 0
    for place, (primal, value) in enumerate(zip(primals, inputs, strict=False)):
        gradient = gradients[place] if place < len(gradients) else None
        if not isinstance(value, nn.Parameter) or not isinstance(gradient, fx.Node):
            continue
        if (owned is not None and value not in owned) or not is_backward(gradient):
            continue
        behind = _last_reader(module, primal, gradient)
        with module.graph.inserting_after(behind):
            arguments = (gradient, updater.number, updater.place_of(value))
            node = module.graph.call_function(update, arguments)
        node.meta = {
            key: gradient.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack")
            if key in gradient.meta
        } | {"val": None, "partitioner_tag": "is_backward", "parameter": primal}  # fmt: skip
        flat[num_outputs + place] = None
        found += 1
    output.args = (pytree.tree_unflatten(flat, spec),)
    return found


def _last_reader(module: fx.GraphModule, primal: fx.Node, gradient: fx.Node) -> fx.Node:
    own = {t.untyped_storage()._cdata for t in tensors(primal)}

    def reads(node: fx.Node) -> bool:
        return any(
            t.untyped_storage()._cdata in own for s in node.all_input_nodes for t in tensors(s)
        )

    last = gradient
    reached = False
    for node in module.graph.nodes:
        reached = reached or node is gradient
        if reached and node.op == "call_function" and is_backward(node) and reads(node):
            last = node
    return last


def postpone(joint: Joint, items: Sequence[Item]) -> int:
    """Move updates behind backward where a plan repeats a call with the parameter after them.

    Returns how many were moved: the graph is another one then.
    """
    done: dict[int, fx.Node] = {}
    late: list[fx.Node] = []
    for item in items:
        if item.repeat:
            again = joint.problem.forward[item.index].again
            assert again is not None
            late += [done[s] for s in again.reads if s in done]
            continue
        node = joint.backward[item.index]
        if node.target is update:
            primal: fx.Node = node.meta["parameter"]
            done.update((joint.numbers[t.untyped_storage()._cdata], node) for t in tensors(primal))
    for node in dict.fromkeys(late):
        joint.module.graph.output_node().prepend(node)
    return len(set(late))
