"""Weights of an ONNX model that stand in a file beside it: where, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mopt.backends.onnx.wire import Outline
from mopt.errors import MoptError, quote
from mopt.safe_read import OpenFile

_NUMBER = re.compile(r"[0-9]{1,19}")
# Others exist in the wild, and a reader that sets attributes from them was CVE-2026-34445.
_KEYS = frozenset({"location", "offset", "length"})


@dataclass(frozen=True)
class ExternalTensor:
    """``nbytes`` from ``offset`` of the data file, as the initializer ``name``."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int


def external_tensors(
    outline: Outline, model: OpenFile, data: OpenFile | None, data_name: str
) -> tuple[ExternalTensor, ...]:
    """Every initializer outside the model, in file order.

    They must all lie in the one file ``data_name``, within it and without overlap: tensors that
    share bytes would grow a small file into a large model. Raises the model's error class
    (``onnx-external``).
    """

    def refuse(name: str, what: str) -> MoptError:
        return model.error(f"{model.name}: tensor {quote(name)} {what}", code="onnx-external")

    found = []
    for tensor in outline.initializers:
        if tensor.external is None:
            continue
        entries = dict(tensor.external)
        if len(entries) != len(tensor.external) or not entries.keys() <= _KEYS:
            raise refuse(tensor.name, f"has the entries {quote(sorted(entries))}, twice or unknown")
        if entries.get("location") != data_name:
            raise refuse(
                tensor.name,
                f"lies in {quote(entries.get('location'))}, expected {quote(data_name)}",
            )
        texts = entries.get("offset", "0"), entries.get("length", "")
        if not all(_NUMBER.fullmatch(text) for text in texts):
            raise refuse(tensor.name, f"has the offset and length {quote(texts)}")
        offset, length = map(int, texts)
        if length != tensor.nbytes:
            raise refuse(tensor.name, f"needs {tensor.nbytes} bytes and has {length}")
        if data is None or offset + length > data.size:
            size = data.size if data else 0
            raise refuse(
                tensor.name, f"ends at byte {offset + length} of {data_name}, which has {size}"
            )
        found.append(ExternalTensor(tensor.name, tensor.data_type, tensor.dims, offset, length))
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 0
    for placed in found:
        if placed.offset < end:
            raise refuse(placed.name, "shares bytes with another tensor")
        end = placed.offset + placed.nbytes
    return tuple(found)
