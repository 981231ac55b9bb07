"""A joint forward and backward graph of AOTAutograd as a recomputation problem.

``read_joint`` finds storages, calls and what may be repeated how; ``mopt.joint_split`` writes a
plan into the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.flops import size_hint
from mopt.joint_tags import is_backward
from mopt.offload import put
from mopt.recompute import OFFLOAD, Again, Call, Link, RecomputeProblem
from mopt.reversible import INVERSE, undo
from mopt.saved_codecs import SQUEEZE

aten = torch.ops.aten
Price = Callable[[fx.Node], tuple[float, int]]
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)

BATCH_NORMS = (aten._native_batch_norm_legit_functional.default, aten.native_batch_norm.default)
# The attention kernels' tag says random also where their dropout is 0; place of that argument.
_DROPOUT_ARGUMENT = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_flash_attention.default: 3,
    aten._scaled_dot_product_efficient_attention.default: 5,
    aten._scaled_dot_product_cudnn_attention.default: 5,
}


@dataclass
class Joint:
    """The graph, its problem, and which nodes stand behind the problem's numbers.

    ``nodes`` are the calls, forward then backward; ``owner`` is the node that holds a storage from
    its first byte on; ``kinds`` are the bytes of weights, inputs and the like, for reports.
    """

    module: fx.GraphModule
    problem: RecomputeProblem
    forward: list[fx.Node]
    backward: list[fx.Node]
    owner: dict[int, fx.Node]
    num_outputs: int
    numbers: dict[int, int]
    kinds: dict[str, int] = field(default_factory=dict)


def tensors(node: fx.Node) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def read_joint(
    module: fx.GraphModule,
    num_outputs: int,
    price: Price,
    *,
    fixed: int = 0,
    link: Link | None = None,
) -> Joint:
    """The problem of a joint graph.

    ``price`` gives seconds and workspace bytes of a call; ``fixed`` are bytes held besides
    (optimizer state); ``link`` is where values may be moved out to. Sizes that vary count as in
    the example inputs.
    """
    return _Reader(module, num_outputs, price).read(fixed, link)


class _Reader:
    def __init__(self, module: fx.GraphModule, num_outputs: int, price: Price) -> None:
        self.module, self.num_outputs, self.price = module, num_outputs, price
        self.numbers: dict[int, int] = {}
        self.sizes: list[int] = []
        self.alive: list[Any] = []
        self.owner: dict[int, fx.Node] = {}
        self.given: set[int] = set()
        output = next(iter(reversed(module.graph.nodes)))
        flat = pytree.tree_leaves(output.args[0])
        self.outputs = [n for n in flat if isinstance(n, fx.Node)]
        self.changed = _changed_inputs(module, output)

    def storages(self, node: fx.Node) -> tuple[int, ...]:
        """The numbers of the storages of a node's value; new ones are listed."""
        found = []
        for tensor in tensors(node):
            storage = tensor.untyped_storage()
            number = self.numbers.get(storage._cdata)
            if number is None:
                number = self.numbers[storage._cdata] = len(self.sizes)
                self.sizes.append(size_hint(storage.nbytes()))
                self.alive.append(storage)  # an address is used again once its storage is gone
                self.owner[number] = node
            found.append(number)
        return tuple(dict.fromkeys(found))

    def read(self, fixed: int, link: Link | None) -> Joint:
        forward: list[tuple[fx.Node, Call]] = []
        backward: list[tuple[fx.Node, Call]] = []
        kinds = {"weights and inputs": 0, "incoming gradients": 0, "other": fixed}
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                known = len(self.sizes)
                self.given.update(self.storages(node))
                kind = "incoming gradients" if is_backward(node) else "weights and inputs"
                kinds[kind] += sum(self.sizes[known:])
            elif node.op == "call_function" and node.target is not operator.getitem:
                if isinstance(node.meta.get("val"), NUMBERS):
                    if not any(is_backward(n) for n in node.all_input_nodes):
                        # A size is kept as a number, whoever asks for it.
                        node.meta["partitioner_tag"] = "is_forward"
                    continue
                call = self._call(node)
                if call is not None:
                    (backward if is_backward(node) else forward).append((node, call))
            elif node.op == "call_function":
                for s in self.storages(node):
                    if self.owner[s] is node.args[0]:
                        self.owner[s] = node
        results = {s for n in self.outputs for s in self.storages(n)} - self.given
        last = self._gradients_of_forward()
        if last:
            backward.append((self.module.graph.output_node(), Call("gradients", last, ())))
        problem = RecomputeProblem(
            tuple(self.sizes), tuple(c for _, c in forward), tuple(c for _, c in backward),
            frozenset(self.given), frozenset(results), sum(kinds.values()), link,
        )  # fmt: skip
        return Joint(
            self.module, problem, [n for n, _ in forward], [n for n, _ in backward], self.owner,
            self.num_outputs, self.numbers, kinds,
        )  # fmt: skip

    def _call(self, node: fx.Node) -> Call | None:
        """The call of a node, or None for a view of what is there or a plain number."""
        known = len(self.sizes)
        if node.target is undo:
            return self._inverse(node)
        touched = self.storages(node)
        makes = tuple(s for s in touched if s >= known)
        reads = tuple(dict.fromkeys(
            s for source in node.all_input_nodes for s in self.storages(source)
        ))  # fmt: skip
        if not makes and (touched or not reads):
            return None
        if node.target is put:
            # Its price is the link's, which is shared: the planner sets it.
            back = Again(makes, reads)
            return Call(node.name, reads, makes, 0.0, 0, layer_of(node), back, OFFLOAD)
        seconds, workspace = self.price(node)
        if node.target is SQUEEZE:
            # Only a plan that keeps the small form runs it; restoring costs about the same, and
            # both together are the price.
            back = Again(makes, reads, 2 * seconds, workspace)
            # What tells one place from another in a form's name is no part of the form.
            form = str(node.args[1]).partition("@")[0]
            return Call(node.name, reads, makes, 0.0, 0, layer_of(node), back, form)
        again = None if is_backward(node) else self._again(node, reads, makes, seconds, workspace)
        return Call(node.name, reads, makes, seconds, workspace, layer_of(node), again)

    def _inverse(self, node: fx.Node) -> Call:
        """What forward does nothing for: a value from its sum with another."""
        result, other, value = node.args
        assert isinstance(result, fx.Node) and isinstance(value, fx.Node)
        sources = [n for n in (result, other) if isinstance(n, fx.Node)]
        reads = tuple(dict.fromkeys(s for n in sources for s in self.storages(n)))
        seconds, _ = self.price(result)
        back = Again(reads, self.storages(value), seconds)
        return Call(node.name, (), (), 0.0, 0, layer_of(node), back, INVERSE)

    def _again(
        self,
        node: fx.Node,
        reads: tuple[int, ...],
        makes: tuple[int, ...],
        seconds: float,
        workspace: int,
    ) -> Again | None:
        if node.target is aten.native_dropout.default and node.args[2] is not False:
            out, mask = (self.storages_of(t) for t in node.meta["val"])
            return Again((*reads, mask), (out,), seconds, workspace + self.sizes[out])
        if node.target in BATCH_NORMS and node.args[5] is True:
            rest = tuple(
                s for a in (*node.args[:3],) if isinstance(a, fx.Node) for s in self.storages(a)
            )
            made = tuple(self.storages_of(t) for t in node.meta["val"][:3])
            return Again(rest, made, seconds, workspace)
        if not isinstance(node.target, torch._ops.OpOverload) or not makes:
            return None
        if node.target._schema.is_mutable or _is_random(node):
            return None
        if any(s in self.changed_storages for s in reads):
            return None
        return Again(reads, makes, seconds, workspace)

    def _gradients_of_forward(self) -> tuple[int, ...]:
        """Forward storages that are handed out as gradients: read when backward ends."""
        made = {
            s for n in self.module.graph.nodes if not is_backward(n) for s in self.storages(n)
        }  # fmt: skip
        flat = pytree.tree_leaves(self.module.graph.output_node().args[0])
        tail = [n for n in flat[self.num_outputs :] if isinstance(n, fx.Node)]
        found = (s for n in tail for s in self.storages(n) if s in made and s not in self.given)
        return tuple(dict.fromkeys(found))

    def storages_of(self, tensor: Tensor) -> int:
        return self.numbers[tensor.untyped_storage()._cdata]

    @property
    def changed_storages(self) -> set[int]:
        return {s for node in self.changed for s in self.storages(node)}


def _changed_inputs(module: fx.GraphModule, output: fx.Node) -> list[fx.Node]:
    """Inputs that the forward pass overwrites: backward would find them changed."""
    primals = [n for n in module.graph.nodes if n.op == "placeholder" and not is_backward(n)]
    by_desc = {n.meta.get("desc"): n for n in primals}
    found = []
    for desc in pytree.tree_leaves(output.meta.get("desc"), is_leaf=_is_desc):
        source = getattr(desc, "mutated_input", None)
        if source in by_desc:
            found.append(by_desc[source])
    for node in module.graph.nodes:
        if node.target is aten.copy_.default and isinstance(node.args[0], fx.Node):
            found.append(node.args[0])
    return found


def _is_desc(value: object) -> bool:
    return not isinstance(value, list | tuple)


def _is_random(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    place = _DROPOUT_ARGUMENT.get(node.target)
    if place is None:
        return True
    named = node.kwargs.get("dropout_p", 0.0)
    return (node.args[place] if len(node.args) > place else named) != 0.0


def layer_of(node: fx.Node) -> str:
    """The module a node comes from, as its path; "" where unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self']", "L['s']", "_modules", "['", "']", '["', '"]'):
        path = path.replace(noise, "." if noise in ("['", "_modules") else "")
    return ".".join(part for part in path.split(".") if part)
