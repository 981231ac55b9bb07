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
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from mopt.backends.onnx.external import ExternalTensor, external_tensors
from mopt.backends.onnx.options import SESSION_CONFIG
from mopt.backends.onnx.runner import ORT_ERRORS, OnnxRunner, first_line, is_memory_error
from mopt.backends.onnx.walker import CheckedModel, check_model
from mopt.backends.onnx.wire import ELEMENT_BITS, scan_model
from mopt.bench_loop import run_bench
from mopt.children import run_child
from mopt.errors import ArtifactError, InputError, LimitError, MoptError, UsageError, quote
from mopt.limits import DEFAULT_LIMITS, Limits
from mopt.machine import trim_heap
from mopt.npz_files import read_npz
from mopt.safe_read import Folder, OpenFile

MODEL = "model.onnx"
DATA_SUFFIX = ".data"
_DISABLED = "optimization.disable_specified_optimizers"

# How external bytes reach ONNX Runtime: numpy types it takes, by TensorProto.DataType; the rest
# goes in as bytes with the type said beside it.
_RAW_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
_TWO_BYTE_TYPES = {16: "uint16"}


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    spinning: bool = True,
    check: bool = True,
    folding: bool = True,
    sha256: Mapping[str, str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> OnnxRunner:
    """Load a model: a folder that holds ``model.onnx``, or the path of an ONNX file.

    Weights outside it stand in one file beside it, named after it with ``.data``; they are mapped,
    not read. ``threads`` None or 0 leaves the number to ONNX Runtime (the physical cores).
    ``spinning`` lets its threads wait busily between operators: faster alone, several times slower
    with a second session at work on few cores. ``check`` has ``check_model`` look at the model
    first, which also decides about constant folding; without it ``folding`` does. ``sha256`` gives
    hashes by file name, checked on the very handles that are loaded.

    Raises ArtifactError (``file-not-found``, ``unsafe-file``, ``onnx-format``, ``onnx-forbidden``,
    ``onnx-external``, ``altered-artifact``, ``onnx-load-failed``), LimitError or UsageError.
    """
    if threads is not None and not 0 <= threads <= 4096:
        raise UsageError(f"{threads} threads, expected 1 to 4096", code="threads")
    with _ModelFiles(path, limits) as files:
        files.check_hashes(sha256 or {})
        outline = scan_model(files.model, limits=limits)
        external = external_tensors(outline, files.model, files.data, files.data_name)
        if check:
            folding = check_model(files.model, outline, limits=limits).may_fold
        return _start(files, external, _options(threads, spinning, folding))


def check_file(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> CheckedModel:
    """The checks of ``open_session`` alone, with the same errors; nothing is loaded."""
    with _ModelFiles(path, limits) as files:
        outline = scan_model(files.model, limits=limits)
        external_tensors(outline, files.model, files.data, files.data_name)
        return check_model(files.model, outline, limits=limits)


class _ModelFiles:
    """The opened file or files of one model."""

    def __init__(self, path: str | os.PathLike[str], limits: Limits) -> None:
        given = Path(path)
        folder, name = (given, MODEL) if given.is_dir() else (given.parent, given.name)
        self.data_name = name + DATA_SUFFIX
        self.data: OpenFile | None = None
        with Folder(folder, limits) as opened:
            self.model = opened.open_file(name)
            if opened.has(self.data_name):
                try:
                    self.data = opened.open_file(self.data_name)
                except MoptError:
                    self.model.close()
                    raise

    def check_hashes(self, sha256: Mapping[str, str]) -> None:
        for file in (self.model, self.data):
            if file is not None and file.name in sha256 and file.sha256() != sha256[file.name]:
                raise ArtifactError(
                    f"{file.name} does not match its hash",
                    code="altered-artifact",
                    hint="compile again, or fetch the artifact again",
                )

    def __enter__(self) -> _ModelFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.model.close()
        if self.data is not None:
            self.data.close()


def _options(threads: int | None, spinning: bool, folding: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings are about the model, not about what users did
    entries = dict(SESSION_CONFIG)
    entries["session.intra_op.allow_spinning"] = "1" if spinning else "0"
    if not folding:
        disabled = entries.get(_DISABLED, "")
        entries[_DISABLED] = f"{disabled};ConstantFolding" if disabled else "ConstantFolding"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _start(
    files: _ModelFiles, external: tuple[ExternalTensor, ...], options: ort.SessionOptions
) -> OnnxRunner:
    model = files.model
    kept: list[Any] = []
    try:
        if external and files.data is not None:
            kept.append(files.data.map())
            values = [_external_value(kept[0], tensor) for tensor in external]
            kept.append(values)
            options.add_external_initializers([tensor.name for tensor in external], values)
        # The handle's path, not the name: what was checked is what ONNX Runtime opens.
        session = ort.InferenceSession(
            model.handle_path, options, providers=["CPUExecutionProvider"]
        )
        # Folding constants leaves the heap several times as large as the weights.
        trim_heap()
    except ORT_ERRORS as e:
        if is_memory_error(e):
            raise LimitError(f"no memory to load {model.name}", code="out-of-memory") from e
        raise ArtifactError(
            f"ONNX Runtime {ort.__version__} cannot load {model.name}: {first_line(e)}",
            code="onnx-load-failed",
        ) from e
    except MemoryError as e:
        raise LimitError(f"no memory to load {model.name}", code="out-of-memory") from e
    return OnnxRunner(session, model.name, kept)


def _external_value(mapped: mmap.mmap, tensor: ExternalTensor) -> ort.OrtValue:
    """The weight as a value over the mapped bytes; only what is packed or misaligned is copied."""
    plain = _RAW_TYPES.get(tensor.data_type)
    dtype = np.dtype(plain or _TWO_BYTE_TYPES.get(tensor.data_type, "uint8"))
    count = math.prod(tensor.dims)
    if ELEMENT_BITS[tensor.data_type] < 8:
        # ONNX Runtime takes the shape from the array, and reads as many packed bytes as it needs.
        array = np.zeros(count, dtype)
        array[: tensor.nbytes] = np.frombuffer(mapped, dtype, tensor.nbytes, tensor.offset)
    elif tensor.offset % dtype.itemsize or not count:
        raw = mapped[tensor.offset : tensor.offset + tensor.nbytes]
        array = np.frombuffer(raw, dtype)
    else:
        array = np.frombuffer(mapped, dtype, count, tensor.offset)
    array = array.reshape(tensor.dims)
    if plain:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)


def probe_file(
    path: str | os.PathLike[str],
    *,
    max_memory: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Check a stranger's model and load it once in a child process, where it can do no harm.

    Call it before ``open_session`` on a file from somebody else: what still crashes the runtime or
    takes more than ``max_memory`` bytes of private memory or ``load_seconds`` becomes an error of
    ``check_file`` or ``mopt.children.run_child``.
    """
    command = _child_command(path)
    run_child(
        command,
        label=f"loading {quote(os.fspath(path))}",
        timeout=limits.load_seconds,
        max_memory=max_memory,
    )


def _child_command(path: str | os.PathLike[str]) -> list[str]:
    """The child that loads a model; checked here, once, so that the child only loads and runs."""
    command = [
        sys.executable, "-P", "-m", "mopt.backends.onnx.session",
        "--bench", os.path.abspath(path), "--unchecked",  # noqa: PTH100
    ]  # fmt: skip
    return command if check_file(path).may_fold else [*command, "--no-folding"]


def bench_command(
    path: str | os.PathLike[str], inputs: str | os.PathLike[str], *, threads: int | None
) -> list[str]:
    """The command that times a model in a fresh process, for ``mopt.measure.Subject``.

    ``inputs`` is an npz file with one array per input, by name. The model is checked here, once,
    with the errors of ``check_file``, so that what is timed is loading and running alone.
    """
    return [
        *_child_command(path),
        "--inputs", os.path.abspath(inputs), "--threads", str(threads or 0),  # noqa: PTH100
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The timing child: prints one line of JSON, or an error on stderr with exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m mopt.backends.onnx.session")
    parser.add_argument("--bench", required=True, metavar="FOLDER", help="model to load and time")
    parser.add_argument("--inputs", metavar="NPZ", help="arrays by input name; none: only load")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-spinning", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="the model was checked before")
    parser.add_argument("--no-folding", action="store_true", help="with --unchecked")
    parser.add_argument("--max-memory", type=int, metavar="BYTES", help="private memory allowed")
    given = parser.parse_args(arguments)
    if given.max_memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (given.max_memory, given.max_memory))
    try:
        print(_bench(given))
    except MoptError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


def _bench(given: argparse.Namespace) -> str:
    # Before the measuring begins: what checking takes is no part of the model's time or memory.
    folding = not given.no_folding if given.unchecked else check_file(given.bench).may_fold

    def open_model() -> OnnxRunner:
        return open_session(
            given.bench,
            threads=given.threads,
            spinning=not given.no_spinning,
            check=False,
            folding=folding,
        )

    if given.inputs is None:
        open_model().close()
        return "{}"
    arrays = read_npz(given.inputs)

    def load() -> Any:
        runner = open_model()
        names = [port.name for port in runner.inputs]
        if set(names) != set(arrays):
            raise InputError(
                f"{given.inputs} holds {quote(sorted(arrays))}, expected {quote(sorted(names))}",
                code="input-names",
            )
        values = [arrays[name] for name in names]
        return lambda: runner.run(values)

    return run_bench(load)


if __name__ == "__main__":
    sys.exit(main())
