"""Finds the parts of a graph that have a kernel, and puts kernel layers in their place.

What has a kernel the files in ``lowerings`` say, one for each pattern: a ``LOWERING`` with the
kernels it uses and a function that finds its sites. Nothing else lists them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from mopt.backends.triton import lowerings
from mopt.backends.triton.kernel import Kernel
from mopt.backends.triton.layers import KernelLayer


@dataclass(frozen=True)
class Site:
    """Calls that one kernel layer takes.

    The layer is called with the values of ``inputs`` and gives that of ``node`` (and of ``also``,
    as a tuple); ``covers`` are the calls between, which nothing else reads. ``make(limit)`` packs
    the weights, ``reference(limit, *inputs)`` is what the layer means, both for the first
    ``limit`` outputs only, 0 for all. ``sample(generator)`` draws small inputs to compare on.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    dtype: torch.dtype
    make: Callable[[int], KernelLayer]
    reference: Callable[..., Any]
    sample: Callable[[torch.Generator], tuple[Tensor, ...]]
    covers: tuple[fx.Node, ...] = ()
    also: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every call that the layer stands for."""
        return (self.node, *self.also, *self.covers)


@dataclass(frozen=True)
class Left:
    """A call that stays with PyTorch although its kind has a kernel, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Lowering:
    """A pattern: its kernels and how its sites are found. Larger patterns have a lower order."""

    kernels: tuple[Kernel, ...]
    find: Callable[[fx.GraphModule], Iterable[Site | Left]]
    order: int = 0


def rows_sample(
    columns: int, dtype: torch.dtype, rows: int = 3
) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Draws a few rows of normal values."""
    return lambda generator: (torch.randn(rows, columns, generator=generator).to(dtype),)


@cache
def all_lowerings() -> tuple[Lowering, ...]:
    """Those of every file in ``lowerings``, larger patterns first."""
    names = sorted(found.name for found in pkgutil.iter_modules(lowerings.__path__))
    modules = [import_module(f"{lowerings.__name__}.{n}") for n in names if n[0] != "_"]
    return tuple(sorted((module.LOWERING for module in modules), key=lambda one: one.order))


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel that a model may be lowered to, by name."""
    return {kernel.name: kernel for one in all_lowerings() for kernel in one.kernels}


def find_sites(module: fx.GraphModule) -> tuple[list[Site], list[Left]]:
    """The calls that kernels take, in the graph's order, and those of their kind that stay."""
    sites: list[Site] = []
    left: dict[fx.Node, Left] = {}
    taken: set[fx.Node] = set()
    for lowering in all_lowerings():
        for found in lowering.find(module):
            if isinstance(found, Left):
                left.setdefault(found.node, found)
            elif taken.isdisjoint(found.nodes):
                taken.update(found.nodes)
                sites.append(found)
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    sites.sort(key=lambda site: place[site.node])
    return sites, [one for node, one in left.items() if node not in taken]


def replace(module: fx.GraphModule, sites: list[Site]) -> list[KernelLayer]:
    """Put the layers of the sites into the graph, which then reads the old weights no more."""
    layers = []
    now: dict[fx.Node, fx.Node] = {}
    place = {node: index for index, node in enumerate(module.graph.nodes)}
    for index, site in enumerate(sites):
        layer = site.make(0)
        name = f"kernel_{index}"
        module.add_submodule(name, layer)
        roots = (site.node, *site.also)
        with module.graph.inserting_before(min(roots, key=lambda node: place[node])):
            call = module.graph.call_module(name, tuple(now.get(n, n) for n in site.inputs))
            values = [call]
            if site.also:
                values = [module.graph.call_function(getitem, (call, i)) for i in range(len(roots))]
        for old, new in zip(roots, values, strict=True):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            now[old] = new
        layers.append(layer)
    # Attention counts as random, so that it would stay although nobody reads it.
    gone = {node for site in sites for node in site.nodes}
    for node in reversed([node for node in module.graph.nodes if node in gone]):
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers(recurse=False) if name not in read]:
        delattr(module, name)
    module.recompile()
    return layers
