"""Whether a smaller model is faster, as far as a cost model can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from mopt.axes import Mask, tensor_key
from mopt.axis_recurrent import LSTM, recurrent_sizes
from mopt.cost import CostModel, Work
from mopt.coupling import Coupling, Group
from mopt.effects import argument
from mopt.flops import shape_of
from mopt.layer_request import layer_request, milliseconds
from mopt.layers import CONVOLUTIONS, LINEAR


class LayerTimes:
    """Estimated times of a program's linear layers and convolutions at any widths."""

    def __init__(self, found: Coupling, model: CostModel) -> None:
        self._found = found
        self._model = model
        self._known: dict[tuple[fx.Node, tuple[int, ...], int | None], float] = {}
        t = found.tracker
        self._calls: list[tuple[fx.Node, tuple[int, ...], dict[int, np.ndarray]]] = []
        self._recurrent: list[tuple[fx.Node, list[list[np.ndarray]]]] = []
        for node in t.program.graph.nodes:
            if node.target in LSTM:
                self._recurrent.append((node, _units_of(found, node)))
            if node.target not in (*LINEAR, *CONVOLUTIONS):
                continue
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                tensor = t.program.weight(weight)
                key = tensor_key(tensor)
                axes = {axis: found.unit_of[t.weights[key, axis]]
                        for axis in range(tensor.dim()) if (key, axis) in t.weights}  # fmt: skip
                self._calls.append((node, tuple(tensor.shape), axes))

    def total(self, removed: Mask) -> float:
        """Milliseconds of all of them without those units."""
        gone = np.append(removed, False)
        layers = sum(self._one(call, shape, axes, gone) for call, shape, axes in self._calls)
        return layers + sum(self._one_recurrent(call, axes, gone) for call, axes in self._recurrent)

    def _one_recurrent(self, call: fx.Node, axes: list[list[np.ndarray]], gone: Mask) -> float:
        """Milliseconds of a recurrent call: of every layer, all its directions."""
        _, directions = recurrent_sizes(call)
        first, second, _ = shape_of(call.args[0].meta["val"])  # type: ignore[union-attr]
        length, batch = (second, first) if call.args[8] else (first, second)
        steps = length * batch
        total = 0.0
        for gates, inputs in axes:
            four, read = int((~gone[gates]).sum()), int((~gone[inputs]).sum())
            sizes = (four, read)
            key = (call, sizes, directions)
            if key not in self._known:
                hidden = four // 4
                weights = directions * four * (read + hidden)
                work = Work(
                    "recurrent", 2.0 * steps * weights, 4.0 * weights,
                    4.0 * steps * (read + directions * hidden),
                    shape=(length, batch, read, hidden, directions), variant="recurrent.lstm",
                )  # fmt: skip
                self._known[key] = self._model.cost(work).milliseconds
            total += self._known[key]
        return total

    def _one(
        self, call: fx.Node, shape: tuple[int, ...], axes: dict[int, np.ndarray], gone: Mask
    ) -> float:
        sizes = list(shape)
        for axis, units in axes.items():
            sizes[axis] = int((~gone[units]).sum())
        groups = None
        if call.target in CONVOLUTIONS:
            groups = int(argument(call, "groups"))
            if groups > 1 and 1 not in axes:  # whole groups go
                groups = max(1, round(groups * sizes[0] / shape[0]))
        key = (call, tuple(sizes), groups)
        if key not in self._known:
            self._known[key] = milliseconds(self._model, layer_request(call, sizes, groups))
        return self._known[key]

    def restore_idle(self, groups: Sequence[Group], removed: Mask) -> tuple[Mask, list[Group]]:
        """Give back the units of groups whose removal saves no time; those groups."""
        now, given_back = self.total(removed), []
        for group in groups:
            if not removed[group.units].any():
                continue
            trial = removed.copy()
            trial[group.units] = False
            without = self.total(trial)
            if without <= now:
                removed, now = trial, without
                given_back.append(group)
        return removed, given_back


def _units_of(found: Coupling, call: fx.Node) -> list[list[np.ndarray]]:
    """Per layer of a recurrent call the units along both axes of its input matrix."""
    t = found.tracker
    matrices = [one for one in call.args[2] if t.program.weight(one).dim() == 2]  # type: ignore[union-attr,arg-type]
    _, directions = recurrent_sizes(call)
    result = []
    for reader in matrices[:: 2 * directions]:
        key = tensor_key(t.program.weight(reader))  # type: ignore[arg-type]
        sizes = t.program.weight(reader).shape  # type: ignore[arg-type]
        result.append([
            found.unit_of[t.weights[key, axis]] if (key, axis) in t.weights
            else np.full(sizes[axis], -1)
            for axis in (0, 1)
        ])  # fmt: skip
    return result
