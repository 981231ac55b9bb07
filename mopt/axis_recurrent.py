"""How an LSTM ties the hidden units of its layers and directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mopt.axes import Factor, Keep, Labels, Tracker, find
from mopt.axis_shapes import set_argument

LSTM = (torch.ops.aten.lstm.input,)
_NEW = {
    torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default, torch.ops.aten.full.default,
    torch.ops.aten.new_full.default, torch.ops.aten.ones.default,
}  # fmt: skip
_GATES = 4


def lstm(t: Tracker, node: fx.Node, why: str) -> list[Labels]:
    """A hidden unit is lost to all layers and directions of the call: it has one width for all."""
    x, states, parameters = node.args[:3]
    labels, last = t.of(x), len(t.shape(x)) - 1
    for axis in range(last):
        labels = t.fix(labels, axis, why)
    inputs = find(labels, last)
    layout = _layout(t, node, parameters)
    if layout is None:
        t.freeze_all(labels, why)
        for one in node.all_input_nodes:
            if one.op == "get_attr":
                t.freeze_all(t.of(one), why)
        return [(), (), ()]
    hidden, directions = layout
    units = t.fresh(hidden)
    per = len(parameters) // _layers(node) // directions  # type: ignore[arg-type]
    for at, reader in enumerate(parameters):  # type: ignore[arg-type]
        assert isinstance(reader, fx.Node)
        kind, layer = at % per, at // (per * directions)
        t.tie(t.weight_axis(reader, 0).reshape(_GATES, hidden), units)
        if kind == 1:
            t.tie(t.weight_axis(reader, 1), units)
        elif kind == 0 and layer:
            t.tie(t.weight_axis(reader, 1).reshape(directions, hidden), units)
        elif kind == 0:
            own = t.weight_axis(reader, 1)
            if inputs is None:
                t.freeze(own, why)
            else:
                t.tie(inputs.atoms, own)
    for state in states:  # type: ignore[union-attr]
        _tie_state(t, node, state, units, why)
    rank = len(t.shape(node.args[0]))
    both = np.concatenate([units] * directions)
    state_labels: Labels = (Factor((rank - 1,), units),)
    return [(Factor((last,), both),), state_labels, state_labels]


def recurrent_sizes(node: fx.Node) -> tuple[int, int]:
    """Layers and directions of an LSTM call."""
    return _layers(node), 2 if node.args[7] else 1


def _layers(node: fx.Node) -> int:
    return int(node.args[4])  # type: ignore[call-overload,no-any-return]


def _layout(t: Tracker, node: fx.Node, parameters: Any) -> tuple[int, int] | None:
    """Hidden width and number of directions; None for parameters of other forms."""
    if node.target not in LSTM or not isinstance(parameters, list | tuple):
        return None
    layers, directions = recurrent_sizes(node)
    per = _GATES if node.args[3] else 2
    stored = all(isinstance(p, fx.Node) and p.op == "get_attr" for p in parameters)
    if not stored or len(parameters) != layers * directions * per:
        return None
    hidden = t.shape(parameters[1])[1]
    fits = all(t.shape(p)[0] == _GATES * hidden for p in parameters)
    return (hidden, directions) if fits else None


def _tie_state(t: Tracker, node: fx.Node, state: Any, units: Any, why: str) -> None:
    """States that start as constants get the new width; others that are computed go along."""
    last = len(t.shape(state)) - 1
    only = all(user is node for user in state.users)
    if state.target in _NEW and only and isinstance(state.meta.get("val"), Tensor):

        def rewrite(keep: Keep) -> None:
            sizes = list(state.args[1] if "new_" in str(state.target) else state.args[0])
            sizes[-1] = int(keep(units).sum())
            set_argument(state, "size", sizes)

        t.rewrites.append(rewrite)
        return
    factor = find(t.of(state), last)
    if factor is None or len(factor.axes) > 1:
        t.freeze_all(t.of(state), why)
        t.freeze(units, f"{why}: its first state is given")
    else:
        t.tie(factor.atoms, units)
