"""How each ``mopt::`` operator is written in ONNX.

A translation is a function that the exporter calls while it traces a graph: it takes the operator's
arguments (tensors as ``onnx_ir.Value`` with dtype and shape, None, and plain Python values) and
returns the value of the result, built from calls on :data:`onnx` and :func:`contributed`. Weights
have no content yet at that point, only shapes, so a change of layout is written as a node on the
weight; the rewrites that follow compute it.

Every module of ``mopt.backends.onnx.translations`` is imported when the table is asked for: a new
operator costs one file there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from mopt.errors import InternalError

OPSET = 23

onnx = Opset("", OPSET)
_microsoft = Opset("com.microsoft", 1)
_any_tensor = [f"tensor({name})" for name in (
    "float", "float16", "bfloat16", "double", "int8", "uint8", "int32", "int64", "bool",
)]  # fmt: skip

Translation = Callable[..., Any]
_translations: dict[str, Translation] = {}


def translates(name: str) -> Callable[[Translation], Translation]:
    """Register the decorated function as the translation of an operator, ``"mopt::name"``."""

    def register(function: Translation) -> Translation:
        known = _translations.get(name)
        if known is not None and known.__module__ != function.__module__:
            raise InternalError(
                f"{name} is translated in both {known.__module__} and {function.__module__}",
                code="duplicate-translation",
            )
        _translations[name] = function
        return function

    return register


def contributed(operator: str, *inputs: ir.Value | None, **attributes: int | float | str) -> Any:
    """Call a com.microsoft operator with one result while the exporter traces."""
    optional = OpSchema.FormalParameterOption.Optional
    # The exporter wants a schema and ONNX has none of these; what matters of it is the order of
    # the inputs and the types of the attributes.
    schema = OpSchema(
        operator,
        _microsoft.domain,
        _microsoft.version,
        inputs=[
            OpSchema.FormalParameter(f"input_{i}", f"T{i}", param_option=optional)
            for i in range(len(inputs))
        ],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[
            ("T", _any_tensor, ""),
            *((f"T{i}", _any_tensor, "") for i in range(len(inputs))),
        ],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTE_TYPES[type(value)])
            for name, value in attributes.items()
        ],
    )
    return Op(_microsoft, operator, schema)(*inputs, **attributes)


_ATTRIBUTE_TYPES = {
    int: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    str: OpSchema.AttrType.STRING,
}


def translation_table() -> dict[Callable[..., Any], Translation]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``."""
    import mopt.ops  # noqa: F401  (registers the operators)
    from mopt.backends.onnx import translations

    for module in sorted(pkgutil.iter_modules(translations.__path__), key=lambda m: m.name):
        importlib.import_module(f"{translations.__name__}.{module.name}")
    found = ((_operator(name), function) for name, function in sorted(_translations.items()))
    return {operator: function for operator, function in found if operator is not None}


def _operator(name: str) -> Callable[..., Any] | None:
    """The operator of that name, None where the library that has it was not imported."""
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    overload: Callable[..., Any] | None = getattr(packet, "default", None)
    return overload
