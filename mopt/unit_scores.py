"""How much a model would miss each removable unit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mopt.coupling import Coupling, Group, Member
from mopt.layers import CONVOLUTIONS, LINEAR
from mopt.moments import ChannelMoments
from mopt.pass_base import PassContext
from mopt.program import Program
from mopt.trainable import batch_gradients

Scores = NDArray[np.float64]
Moments = dict[fx.Node, ChannelMoments]

# Rows of one batch that a second moment is taken over.
_MOST_ROWS = 4096
# Of the mean of the diagonal, added before a second moment is inverted.
_RIDGE = 0.01


def magnitude_scores(program: Program, found: Coupling) -> Scores:
    """The mean square of what a unit owns, summed over its tensors, each relative to its own mean.

    Relative, because a batch norm's scale and a convolution's weights differ in size.
    """
    scores = np.zeros(found.unit_count)
    for group in found.groups:
        for member in group.members:
            tensor = program.weight(member.weight).double()
            others = [axis for axis in range(tensor.dim()) if axis != member.axis]
            power = tensor.square().sum(others) if others else tensor.square()
            own = _summed(power, member, found.unit_count)[group.units]
            if own.mean() > 0:
                scores[group.units] += own / own.mean() / len(group.members)
    return scores


def collect_moments(program: Program, found: Coupling, ctx: PassContext) -> Moments:
    """The second moments of what the reading layers of all groups read, by that value's node."""
    assert ctx.calibration is not None
    observers: Moments = {}
    for group in found.groups:
        for member in _read_by_layers(group) or ():
            source = member.call.args[0]
            assert isinstance(source, fx.Node)
            axis = -1 if member.call.target in LINEAR else 1
            observers.setdefault(source, ChannelMoments(axis, _MOST_ROWS))
    ctx.calibration.for_part(program).collect(observers, ctx)
    return observers


def output_scores(
    program: Program, found: Coupling, moments: Moments, *, reconstruct: bool
) -> Scores:
    """The share of its readers' output power that is lost with a unit, summed over the readers.

    With ``reconstruct``, what is lost if the readers' other weights then make up for it as well as
    they can (the optimal brain surgeon's score, with the inputs' second moment for the Hessian);
    without, the power of the unit's own contribution (Wanda's score, summed over a unit). Units
    that recurrent layers read, inside of which no value is seen, are judged by magnitude.
    """
    scores = np.zeros(found.unit_count)
    inverses: dict[fx.Node, Tensor] = {}
    for group in found.groups:
        layers = _read_by_layers(group)
        if layers is None:
            own = magnitude_scores(program, found)[group.units]
            scores[group.units] = own / max(float(own.sum()), 1e-300)
            continue
        for member in layers:
            source = member.call.args[0]
            assert isinstance(source, fx.Node)
            second = moments[source].second
            weight = program.weight(member.weight).double()
            columns = weight.movedim(member.axis, 0).flatten(1)
            if len(columns) != len(second):  # the same places in every group of a convolution
                second = _per_place(second, len(columns))
            gram = columns @ columns.t()
            power = float((gram * second).sum()) or 1.0
            if reconstruct:
                if source not in inverses:
                    inverses[source] = _inverse(moments[source].second)
                inverse = inverses[source]
                if len(inverse) != len(columns):
                    inverse = _inverse(second)
                lost = _block_scores(member, group, gram, inverse, invert=True)
            else:
                lost = _block_scores(member, group, gram, second, invert=False)
            scores[group.units] += lost / power
    return scores


def _read_by_layers(group: Group) -> list[Member] | None:
    """The members that read a group's units; None if some are no linear layer or convolution."""
    found = group.of_role("in")
    plain = all(member.call.target in (*LINEAR, *CONVOLUTIONS) for member in found)
    return found if plain else None


def _per_place(second: Tensor, places: int) -> Tensor:
    """The mean over groups of the moments within a group of channels."""
    groups = len(second) // places
    blocks = second.reshape(groups, places, groups, places)
    return blocks.diagonal(dim1=0, dim2=2).mean(-1)


def _inverse(second: Tensor) -> Tensor:
    damped = second.clone()
    damped.diagonal().add_(_RIDGE * second.diagonal().mean().clamp(min=1e-30))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _block_scores(
    member: Member, group: Group, gram: Tensor, moment: Tensor, *, invert: bool
) -> Scores:
    """trace(gram_uu moment_uu) per unit, with the inverse of that block if ``invert``."""
    places: dict[int, list[int]] = {}
    for place, unit in enumerate(member.units.tolist()):
        places.setdefault(unit, []).append(place)
    own = [places[unit] for unit in group.units.tolist()]
    if all(len(one) == 1 for one in own):
        index = torch.tensor([one[0] for one in own])
        diagonal = moment.diagonal()[index]
        value = gram.diagonal()[index] * (1 / diagonal if invert else diagonal)
        return value.numpy()
    result = []
    for one in own:
        index = torch.tensor(one)
        block = moment[index][:, index]
        block = torch.linalg.inv(block) if invert else block
        result.append(float((gram[index][:, index] * block).sum()))
    return np.array(result)


def _summed(values: Tensor, member: Member, count: int) -> Scores:
    """Values per place added up per unit."""
    result = np.zeros(count + 1)
    np.add.at(result, member.units, values.numpy())  # places that stay go to the last entry
    return result[:-1]


def gradient_scores(
    program: Program, found: Coupling, ctx: PassContext, *, squared_first: bool
) -> Scores:
    """The mean square of what a small change of a unit's value changes in a loss; needs no labels.

    The product of a reader's weights with their gradients, summed over all that reads a unit, is
    the gradient of a factor on the unit (Molchanov et al. 2019, "Importance Estimation for Neural
    Network Pruning", eq. 8, on readers). With ``squared_first`` the squares are summed: the
    diagonal Fisher information of the weights. The loss is that of ``mopt.trainable.sampled_loss``.
    """
    members = [(group, member) for group in found.groups for member in group.of_role("in")]
    readers = {str(member.weight.target): member.weight for _, member in members}
    scores = np.zeros(found.unit_count)
    count = 0
    for gradients in batch_gradients(program, ctx, list(readers.values())):
        count += 1
        slope = np.zeros(found.unit_count)
        for group, member in members:
            change = gradients[str(member.weight.target)] * program.weight(member.weight)
            change = change.double().movedim(member.axis, 0).flatten(1)
            values = (change.square() if squared_first else change).sum(1)
            slope[group.units] += _summed(values, member, found.unit_count)[group.units]
        scores += slope if squared_first else slope**2
    return scores / max(count, 1)


def width_losses(group: Group, scores: Scores) -> Scores:
    """What is lost with the 0, 1, 2, ... least important units of a group: the sums of scores.

    For scores of :func:`output_scores` that is a share of the readers' output power.
    """
    return np.concatenate([[0.0], np.cumsum(np.sort(scores[group.units]))])
