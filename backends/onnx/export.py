"""From an fx graph to an ONNX model that ONNX Runtime runs well on a CPU.

The graph goes through ``torch.export`` once more (a pass may have edited it), through PyTorch's
ONNX exporter with the translations of the ``mopt::`` operators, and through the rewrites of
``mopt.backends.onnx.rewrite``. What comes out holds nothing of the machine it was made on, and the
same graph gives the same bytes in every process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import optimizer
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mopt.backends.onnx.finish import finish
from mopt.backends.onnx.rewrite import apply_rewrites
from mopt.backends.onnx.translate import OPSET, translation_table
from mopt.errors import LoweringError, first_line

_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def export_onnx(
    graph_module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    *,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
) -> ir.Model:
    """The graph as an ONNX model of opset 23 with ONNX Runtime's contributed operators.

    ``args``, ``kwargs`` and ``dynamic_shapes`` are those the graph was captured with; the inputs of
    the model are the tensors among them in order, its outputs the flattened results. Names that are
    not given are those of the graph's placeholders and results. Raises LoweringError when the
    exporter has no translation for an operator.
    """
    args, kwargs = _traced_sizes(graph_module, args, kwargs)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                graph_module, args, kwargs or None, dynamic_shapes=dynamic_shapes, strict=False
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translation_table(),
                input_names=input_names,
                output_names=output_names,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter has no common base for what it raises
            raise _failure(error) from error
        assert program is not None
        model = program.model
        _simplify(model)
        apply_rewrites(model)
        finish(model)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold shapes and small constants, but leave every weight as it is stored."""
    weights = set(model.graph.initializers.values())

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value in weights for value in node.inputs) else None

    optimizer.optimize_ir(model, should_fold=should_fold)
    common_passes.RemoveUnusedNodesPass()(model)


def _traced_sizes(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in the sizes the graph was traced with.

    Export would fix a dynamic dimension whose example size is 1 for good, so capture traced it
    with another size, which the placeholder remembers.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    traced = [
        _resize(leaf, node.meta.get("val")) if isinstance(leaf, Tensor) else leaf
        for leaf, node in zip(leaves, placeholders, strict=True)
    ]
    new_args, new_kwargs = pytree.tree_unflatten(traced, spec)
    return new_args, new_kwargs


def _resize(tensor: Tensor, like: Any) -> Tensor:
    if not isinstance(like, Tensor):
        return tensor
    for dim, size in enumerate(like.shape):
        wanted = size.node.hint if isinstance(size, torch.SymInt) else size
        if wanted is not None and tensor.shape[dim] == 1 != wanted:
            tensor = tensor.expand(*[wanted if d == dim else -1 for d in range(tensor.dim())])
    return tensor.contiguous()


def _failure(error: Exception) -> LoweringError:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return LoweringError(
        f"the ONNX exporter failed: {type(causes[-1]).__name__}: {first_line(causes[-1])}",
        code="onnx-export",
        hint="the operator named here has no translation to ONNX; keep this part eager",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's log lines and deprecation warnings from the user."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
