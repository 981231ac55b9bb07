"""Whether a smaller model is faster, as far as a cost model can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from mopt.axes import Mask, tensor_key
from mopt.cost import CostModel
from mopt.coupling import Coupling, Group
from mopt.effects import argument
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
        for node in t.program.graph.nodes:
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
        return sum(self._one(call, shape, axes, gone) for call, shape, axes in self._calls)

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
