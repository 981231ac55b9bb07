"""Feed-forward weights on flash: bundled rows and columns, windows of neurons, and what reads cost.

Where most neurons of a feed-forward block are zero for a token, only the weights of the others have
to be read ("LLM in a flash", 2023). Neuron i needs row i of the up (and gate) projection and column
i of the down projection: bundled, they are one read instead of two or three, and neurons used by
the last tokens need not be read again. Which neurons a token activates is the caller's to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopt.errors import InputError
from mopt.tier_times import Link


def bundle_neurons(down: Tensor, *others: Tensor) -> Tensor:
    """All weights of each neuron in one row: (F, (1 + len(others)) * D), contiguous.

    ``others`` are projections into the block, (F, D) each: up, and gate where there is one;
    ``down`` is (D, F). Raises InputError (``bundle-shapes``) where they do not belong together.
    """
    neurons = down.t()
    if down.dim() != 2 or not others or any(
        one.shape != neurons.shape or one.dtype != down.dtype for one in others
    ):  # fmt: skip
        shapes = ", ".join(str(tuple(one.shape)) for one in (down, *others))
        raise InputError(
            f"weights of shapes {shapes} are no feed-forward block",
            code="bundle-shapes",
            hint="give down (D, F), then up and gate (F, D), in one dtype",
        )
    return torch.cat([*others, neurons], 1).contiguous()


def unbundle_neurons(bundles: Tensor, width: int) -> tuple[Tensor, ...]:
    """What ``bundle_neurons`` was given, or the rows and columns of some neurons: down comes first.

    ``width`` is D. A selection of rows gives the block of these neurons alone.
    """
    if bundles.dim() != 2 or width < 1 or bundles.shape[1] % width:
        raise InputError(
            f"rows of {tuple(bundles.shape)} are no bundles of width {width}",
            code="bundle-shapes",
        )
    *others, down = bundles.split(width, 1)
    return (down.t(), *others)


@dataclass(frozen=True)
class NeuronReads:
    """What a sequence of tokens reads if neurons of the last ``window`` tokens stay in memory.

    ``read_bytes`` and ``seconds`` are means per token, the first token (which reads everything it
    needs) included; ``resident_bytes`` is the most that the window ever holds.
    """

    window: int
    read_bytes: float
    seconds: float
    resident_bytes: int


def neuron_reads(
    active: Sequence[Collection[int]], row_bytes: int, matrices: int, link: Link, *,
    window: int = 1, bundled: bool = True,
) -> NeuronReads:  # fmt: skip
    """Reads of one block: ``active`` are the neurons that each token needs.

    ``row_bytes`` are those of one row of one projection, ``matrices`` is 2, or 3 with a gate. A
    bundle is one request of ``matrices * row_bytes``; without bundles there is one per matrix.
    Raises InputError (``window``) unless there are tokens and ``window`` is positive.
    """
    if window < 1 or not active:
        raise InputError(
            f"a window of {window} of {len(active)} tokens reads nothing", code="window"
        )
    chunk = row_bytes * (matrices if bundled else 1)
    held: Counter[int] = Counter()
    total = most = 0
    seconds = 0.0
    for at, neurons in enumerate(active):
        now = set(neurons)
        missing = sum(1 for neuron in now if not held[neuron]) * matrices * row_bytes
        total += missing
        seconds += link.seconds(missing, chunk)
        held.update(now)
        # What is needed now lies there together with what the window still holds.
        most = max(most, sum(1 for count in held.values() if count))
        if at >= window:
            held.subtract(set(active[at - window]))
    return NeuronReads(
        window, total / len(active), seconds / len(active), most * matrices * row_bytes
    )


def best_window(
    active: Sequence[Collection[int]], row_bytes: int, matrices: int, link: Link, *,
    most_bytes: int, widest: int = 16,
) -> NeuronReads:  # fmt: skip
    """The window of at most ``widest`` tokens with the fewest seconds within ``most_bytes``.

    Raises InputError (``window``) where not even the neurons of one token fit.
    """
    tried = [
        neuron_reads(active, row_bytes, matrices, link, window=w) for w in range(1, widest + 1)
    ]
    fitting = [found for found in tried if found.resident_bytes <= most_bytes]
    if not fitting:
        raise InputError(
            f"the neurons of one token take {tried[0].resident_bytes} bytes, {most_bytes} are "
            "there",
            code="window",
        )
    return min(fitting, key=lambda found: (found.seconds, found.window))
