"""Run an ONNX model in ONNX Runtime, from files that were checked first. Imports no torch.

    with open_session("out/model") as session:
        logits, = session.run([tokens])

Also the child that times an artifact in a fresh process (``bench_command``), which starts in a
fraction of a second because torch stays out of it.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from mopt.backends.onnx.external import ExternalTensor, external_tensors
from mopt.backends.onnx.wire import scan_model
from mopt.bench_loop import run_bench
from mopt.errors import ArtifactError, InputError, LimitError, MoptError, UsageError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.npz_files import read_npz
from mopt.safe_read import Folder, OpenFile

# Configuration entries every session gets; see ONNX Runtime's session option keys.
SESSION_OPTIONS: dict[str, str] = {}
MODEL = "model.onnx"
DATA_SUFFIX = ".data"

_ORT_ERRORS = (
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
# How external bytes reach ONNX Runtime: numpy types it takes, by TensorProto.DataType; the rest
# goes in as bytes with the type said beside it.
_RAW_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
_TWO_BYTE_TYPES = {16: "uint16"}


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
        except _ORT_ERRORS as e:
            if _is_memory_error(e):
                raise LimitError(
                    f"no memory to run the model on {_shapes(inputs)}",
                    code="out-of-memory",
                    hint="use a smaller batch or a machine with more memory",
                ) from e
            raise InputError(
                f"the model cannot run on these values ({_shapes(inputs)}): {_first_line(e)}",
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


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    spinning: bool = True,
    sha256: Mapping[str, str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> OnnxRunner:
    """Load a model: a folder that holds ``model.onnx``, or the path of an ONNX file.

    Weights outside it stand in one file beside it, named after it with ``.data``; they are mapped,
    not read. ``threads`` None or 0 leaves the number to ONNX Runtime (the physical cores).
    ``spinning`` lets its threads wait busily between operators: faster alone, several times slower
    with a second session at work on few cores. ``sha256`` gives hashes by file name, checked on the
    very handles that are loaded.

    Raises ArtifactError (``file-not-found``, ``unsafe-file``, ``onnx-format``, ``onnx-external``,
    ``altered-artifact``, ``onnx-load-failed``), LimitError or UsageError.
    """
    if threads is not None and not 0 <= threads <= 4096:
        raise UsageError(f"{threads} threads, expected 1 to 4096", code="threads")
    given = Path(path)
    folder, name = (given, MODEL) if given.is_dir() else (given.parent, given.name)
    data_name = name + DATA_SUFFIX
    with Folder(folder, limits) as opened, opened.open_file(name) as model:
        data = opened.open_file(data_name) if opened.has(data_name) else None
        try:
            _check_hashes([f for f in (model, data) if f is not None], sha256 or {})
            outline = scan_model(model, limits=limits)
            external = external_tensors(outline, model, data, data_name)
            return _start(model, data, external, threads, spinning)
        finally:
            if data is not None:
                data.close()


def _check_hashes(files: list[OpenFile], sha256: Mapping[str, str]) -> None:
    for file in files:
        if file.name in sha256 and file.sha256() != sha256[file.name]:
            raise ArtifactError(
                f"{file.name} does not match its hash",
                code="altered-artifact",
                hint="compile again, or fetch the artifact again",
            )


def _start(
    model: OpenFile,
    data: OpenFile | None,
    external: tuple[ExternalTensor, ...],
    threads: int | None,
    spinning: bool,
) -> OnnxRunner:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings are about the model, not about what users did
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    kept: list[Any] = []
    try:
        if external and data is not None:
            kept.append(data.map())
            values = [_external_value(kept[0], tensor) for tensor in external]
            kept.append(values)
            options.add_external_initializers([tensor.name for tensor in external], values)
        # The handle's path, not the name: what was checked is what ONNX Runtime opens.
        session = ort.InferenceSession(
            model.handle_path, options, providers=["CPUExecutionProvider"]
        )
    except _ORT_ERRORS as e:
        if _is_memory_error(e):
            raise LimitError(f"no memory to load {model.name}", code="out-of-memory") from e
        raise ArtifactError(
            f"ONNX Runtime {ort.__version__} cannot load {model.name}: {_first_line(e)}",
            code="onnx-load-failed",
        ) from e
    except MemoryError as e:
        raise LimitError(f"no memory to load {model.name}", code="out-of-memory") from e
    return OnnxRunner(session, model.name, kept)


def _external_value(mapped: mmap.mmap, tensor: ExternalTensor) -> ort.OrtValue:
    """The weight as a value over the mapped bytes: nothing is copied."""
    plain = _RAW_TYPES.get(tensor.data_type)
    dtype = np.dtype(plain or _TWO_BYTE_TYPES.get(tensor.data_type, "uint8"))
    count = math.prod(tensor.dims)
    if not count:
        array = np.zeros(0, dtype)
    elif tensor.offset % dtype.itemsize:
        raw = mapped[tensor.offset : tensor.offset + tensor.nbytes]
        array = np.frombuffer(raw, dtype)
    else:
        array = np.frombuffer(mapped, dtype, tensor.nbytes // dtype.itemsize, tensor.offset)
    if plain:
        return ort.OrtValue.ortvalue_from_numpy(array.reshape(tensor.dims))
    if array.size == count:
        array = array.reshape(tensor.dims)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)


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


def _first_line(e: BaseException) -> str:
    return quote((str(e).strip() or type(e).__name__).splitlines()[0], 300)


def _is_memory_error(e: BaseException) -> bool:
    text = str(e)
    return "Failed to allocate memory" in text or "bad_alloc" in text or "bad allocation" in text


def bench_command(
    path: str | os.PathLike[str], inputs: str | os.PathLike[str], *, threads: int | None
) -> list[str]:
    """The command that times a model in a fresh process, for ``mopt.measure.Subject``.

    ``inputs`` is an npz file with one array per input, by name.
    """
    return [
        sys.executable, "-P", "-m", "mopt.backends.onnx.session",
        "--bench", os.path.abspath(path), "--inputs", os.path.abspath(inputs),  # noqa: PTH100
        "--threads", str(threads or 0),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The timing child: prints one line of JSON, or an error on stderr with exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m mopt.backends.onnx.session")
    parser.add_argument("--bench", required=True, metavar="FOLDER", help="model to load and time")
    parser.add_argument("--inputs", metavar="NPZ", help="arrays by input name; none: only load")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-spinning", action="store_true")
    parser.add_argument("--max-memory", type=int, metavar="BYTES", help="private memory allowed")
    given = parser.parse_args(arguments)
    if given.max_memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (given.max_memory, given.max_memory))
    try:
        print(_bench(given.bench, given.inputs, given.threads, not given.no_spinning))
    except MoptError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


def _bench(path: str, inputs: str | None, threads: int, spinning: bool) -> str:
    if inputs is None:
        open_session(path, threads=threads, spinning=spinning).close()
        return "{}"
    arrays = read_npz(inputs)

    def load() -> Any:
        runner = open_session(path, threads=threads, spinning=spinning)
        names = [port.name for port in runner.inputs]
        if set(names) != set(arrays):
            raise InputError(
                f"{inputs} holds {quote(sorted(arrays))}, expected {quote(sorted(names))}",
                code="input-names",
            )
        values = [arrays[name] for name in names]
        return lambda: runner.run(values)

    return run_bench(load)


if __name__ == "__main__":
    sys.exit(main())
