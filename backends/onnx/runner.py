"""A loaded ONNX model: checks what it is given, says what is wrong, runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from mopt.errors import ArtifactError, InputError, LimitError, UsageError, quote

# What ONNX Runtime raises, at loading and at running.
ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)
# Types that numpy has too.
_PORT_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("float32"),
    "tensor(float16)": np.dtype("float16"),
    "tensor(double)": np.dtype("float64"),
    "tensor(bool)": np.dtype("bool"),
    **{
        f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Port:
    """An input or output: ``shape`` has numbers, and names or None for sizes that may vary."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype.name}[{sizes}]"


class OnnxRunner:
    """A loaded model. ``inputs`` and ``outputs`` say what it takes and gives, in order."""

    def __init__(self, session: ort.InferenceSession, name: str, kept: list[Any]) -> None:
        self._session: ort.InferenceSession | None = session
        # Mapped weights must outlive the session that reads them.
        self._kept = kept
        self.inputs = _ports(session.get_inputs(), name)
        self.outputs = _ports(session.get_outputs(), name)
        self._output_names = [port.name for port in self.outputs]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for inputs in the order of ``inputs``; the arrays are not changed.

        Raises InputError (``input-count``, ``input-dtype``, ``input-shape``, or ``onnx-run-failed``
        for values the model cannot take), LimitError ``out-of-memory``, or UsageError
        ``runner-closed``.
        """
        if self._session is None:
            raise UsageError("the model was closed", code="runner-closed", hint="load it again")
        feed = self._checked(inputs)
        try:
            return self._session.run(self._output_names, feed)
        except ORT_ERRORS as e:
            if is_memory_error(e):
                raise LimitError(
                    f"no memory to run the model on {_shapes(inputs)}",
                    code="out-of-memory",
                    hint="use a smaller batch or a machine with more memory",
                ) from e
            raise InputError(
                f"the model cannot run on these values ({_shapes(inputs)}): {first_line(e)}",
                code="onnx-run-failed",
            ) from e
        except MemoryError as e:
            raise LimitError(
                f"no memory to run the model on {_shapes(inputs)}", code="out-of-memory"
            ) from e

    def _checked(self, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        if len(inputs) != len(self.inputs):
            wanted = ", ".join(f"{port.name} {port}" for port in self.inputs)
            raise InputError(
                f"expected {len(self.inputs)} inputs, found {len(inputs)}",
                code="input-count",
                hint=f"the model takes {wanted}",
            )
        feed: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for port, value in zip(self.inputs, inputs, strict=True):
            array = np.asarray(value)
            found = f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"
            if array.dtype != port.dtype:
                raise InputError(
                    f"input {quote(port.name)}: expected {port}, found {found}",
                    code="input-dtype",
                    hint=f"convert it: .astype('{port.dtype.name}')",
                )
            if len(array.shape) != len(port.shape) or any(
                isinstance(size, int) and size != have
                for size, have in zip(port.shape, array.shape, strict=True)
            ):
                raise InputError(
                    f"input {quote(port.name)}: expected {port}, found {found}", code="input-shape"
                )
            for size, have in zip(port.shape, array.shape, strict=True):
                if isinstance(size, str):
                    before, where = sizes.setdefault(size, (have, port.name))
                    if before != have:
                        raise InputError(
                            f"input {quote(port.name)}: {quote(size)} is {have}, but {before} in "
                            f"input {quote(where)}",
                            code="input-shape",
                        )
            feed[port.name] = np.ascontiguousarray(array)
        return feed

    def close(self) -> None:
        """Free the model's memory; running it afterwards is an error. May be called again."""
        self._session = None
        self._kept = []

    def __enter__(self) -> OnnxRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _ports(arguments: Sequence[Any], model: str) -> tuple[Port, ...]:
    ports = []
    for argument in arguments:
        if argument.type not in _PORT_TYPES:
            raise ArtifactError(
                f"{model}: {quote(argument.name)} is a {argument.type}, which cannot be given or "
                "taken as a numpy array",
                code="onnx-port-type",
                hint="let the model convert at its border, for example to float32",
            )
        ports.append(Port(argument.name, _PORT_TYPES[argument.type], tuple(argument.shape)))
    return tuple(ports)


def _shapes(inputs: Sequence[np.ndarray]) -> str:
    return ", ".join(str(list(np.shape(value))) for value in inputs)


def first_line(e: BaseException) -> str:
    """The first line of an error of ONNX Runtime; the others repeat it."""
    return quote((str(e).strip() or type(e).__name__).splitlines()[0], 300)


def is_memory_error(e: BaseException) -> bool:
    """Whether ONNX Runtime ran out of memory, which it reports as a plain failure."""
    text = str(e)
    return "Failed to allocate memory" in text or "bad_alloc" in text or "bad allocation" in text
