"""What a program without some units must equal: the same program with what reads them zeroed."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from mopt.axes import Mask
from mopt.coupling import Coupling, find_coupling, shrink
from mopt.program import Program
from tests.case import assert_near, grown_inputs, outputs


def zeroed(program: Program, found: Coupling, removed: Mask) -> Program:
    """A copy in which the layers that read the removed units no longer look at them."""
    copy = program.copy()
    calls = {node.name: node for node in copy.graph.nodes}
    gone = np.append(removed, False)
    now: dict[tuple[str, str], fx.Node] = {}  # what a call reads in place of a weight
    for group in found.groups:
        for member in group.of_role("in"):
            places = np.flatnonzero(gone[member.units])
            call = calls[member.call.name]
            key = call.name, member.weight.name
            reader = now.get(key, calls[member.weight.name])
            weight = copy.weight(reader).clone()
            weight.index_fill_(member.axis, torch.from_numpy(places), 0)
            now[key] = copy.add_weight(f"{reader.target}_zeroed", weight, call)
            call.replace_input_with(reader, now[key])
    copy.refresh()
    return copy


def some_removed(found: Coupling, share: float, seed: int = 0) -> Mask:
    """A share of every group, drawn at random; one unit at least where a group has several."""
    generator = np.random.default_rng(seed)
    removed = np.zeros(found.unit_count, dtype=bool)
    for group in found.groups:
        count = min(max(int(len(group.units) * share), 1), len(group.units) - 1)
        trial = removed.copy()
        trial[generator.choice(group.units, count, replace=False)] = True
        removed = removed if found.would_empty(trial) else trial
    return removed


def check_pruned(program: Program, share: float = 0.25, *, seed: int = 0) -> Program:
    """Prune a share of every group at random; fail unless the result equals the zeroed program.

    2e-5 of the largest output: sums over fewer terms are added up in another order.
    """
    result = program.copy()
    found = find_coupling(result)
    removed = some_removed(found, share, seed)
    reference = zeroed(result, found, removed)
    predicted = found.flops(removed), found.parameters(removed)
    shrink(result, found, removed)
    result.verify()
    assert result.flops() == round(predicted[0])
    assert result.parameter_count() == round(predicted[1])
    sizes = [(program.args, program.kwargs), grown_inputs(program)]
    for args, kwargs in (size for size in sizes if size is not None):
        expected = outputs(reference, args, kwargs)
        assert_near(expected, outputs(result, args, kwargs), tolerance=2e-5, what="pruned")
    return result
