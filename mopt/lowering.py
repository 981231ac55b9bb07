"""Backends and artifacts: a Program becomes a folder that runs without the user's code.

An artifact holds the lowered model, ``manifest.json`` and ``report.json``. The manifest names every
file with its SHA-256; loading checks them all before anything is opened by a runtime.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature as signature_parameters
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from mopt import __version__
from mopt.disk import scratch_folder
from mopt.errors import ArtifactError, LoweringError, UsageError
from mopt.files import write_folder
from mopt.json_files import json_bytes, parse_json, read_json
from mopt.manifest import SCHEMA, check_manifest
from mopt.pass_base import Skip
from mopt.registry import find_backend
from mopt.report import Report
from mopt.safe_read import Folder
from mopt.signature import Signature

if TYPE_CHECKING:
    from torch import nn

    from mopt.islands import IslandProgram
    from mopt.program import Program

MANIFEST = "manifest.json"
REPORT = "report.json"
SAMPLE = "sample.npz"


class Runner(Protocol):
    """A loaded graph: flat arrays or tensors in, flat list out."""

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Outputs for one set of inputs, in signature order."""
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...


class Backend(Protocol):
    """Lowers Programs and runs what it lowered."""

    name: str

    def unsupported(self, program: Program) -> list[Skip]:
        """Everything that cannot be lowered, with sites: empty when all is well."""
        ...

    def lower(self, program: Program, folder: Path, signature: Signature) -> list[str]:
        """Write the lowered model into ``folder``; the names of the files written."""
        ...

    def open(self, folder: Path, signature: Signature, *, threads: int | None) -> Runner:
        """Load a lowered model. The files' hashes were checked already."""
        ...

    def bench_command(self, folder: Path, inputs: Path, *, threads: int | None) -> list[str]:
        """A command that times the model in a fresh process (see ``mopt.measure.Subject``)."""
        ...


@dataclass
class Artifact:
    """A lowered model in a folder, with its manifest and report.

    Made by :func:`lower` or ``mopt.compile`` in a temporary folder; :meth:`save` puts it where the
    user wants it.
    """

    folder: Path
    manifest: dict[str, Any]
    report: Report | None = None
    program: Program | None = None
    module: nn.Module | None = None
    _cleanup: Callable[[], Any] | None = field(default=None, repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of the lowered model's files; the report and the stored sample do not count."""
        files = self.manifest["files"]
        return sum(entry["bytes"] for name, entry in files.items() if name != SAMPLE)

    def add_file(self, name: str) -> None:
        """List a file that was written into :attr:`folder` in the manifest."""
        self.manifest["files"][name] = _entry(self.folder / name)

    def save(
        self, target: str | Path, *, force: bool = False, beside: Mapping[str, bytes] | None = None
    ) -> Path:
        """Write the artifact to ``target``: complete or not at all.

        ``beside`` are files for people, by name: they have no hash. Raises UsageError when the
        folder exists and ``force`` is false.
        """
        target = Path(target)
        with write_folder(target, force=force, needed=self.size_bytes) as part:
            for name in sorted(self.manifest["files"]):
                with part.create(name) as writer, (self.folder / name).open("rb") as source:
                    shutil.copyfileobj(source, writer, 1 << 20)
            if self.report is not None:
                part.write(REPORT, self.report.to_json().encode())
            for name, content in (beside or {}).items():
                part.write(name, content)
            part.write(MANIFEST, json_bytes(self.manifest))
        return target

    def load(self, *, threads: int | None = None, apart: bool = False) -> Loaded:
        """The callable, ready to run; with ``apart``, a large model runs in another process.

        That keeps its memory out of this one, where the backend can.
        """
        return open_artifact(
            self.folder, self.manifest, module=self.module, threads=threads, apart=apart
        )


class Loaded:
    """A callable with the inputs and outputs of the user's model.

    Takes torch tensors or numpy arrays and gives torch tensors in the model's own nesting (numpy
    when every input was numpy). Also a context manager.
    """

    def __init__(
        self, call: Callable[..., Any], close: Callable[[], None], manifest: Mapping[str, Any]
    ) -> None:
        self._call = call
        self._close = close
        self.manifest = manifest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def close(self) -> None:
        """Free the runtime's memory; calling again is an error of the runtime."""
        self._close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def lower(program: Program, backend: str = "onnx", *, target: str = "host") -> Artifact:
    """Lower a program into an artifact in a temporary folder.

    Raises LoweringError listing everything the backend cannot express, or naming a layer whose
    scales are not finite, before anything is written.
    """
    from mopt.formats.base import require_finite_scales
    from mopt.program_signature import signature_of

    chosen = find_backend(backend)
    refused = [skip for part in program.parts().values() for skip in chosen.unsupported(part)]
    if refused:
        listing = "\n".join(f"  {skip.site}: {skip.reason}" for skip in refused[:20])
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise LoweringError(
            f"backend {backend!r} cannot lower {len(refused)} sites:\n{listing}{more}",
            code="cannot-lower",
            hint="try --backend eager, or leave these layers out of the recipe with skip=...",
        )
    for part in program.parts().values():
        require_finite_scales(part)
    folder, remove = scratch_folder("mopt-artifact")
    artifact = Artifact(folder, {}, program=program)
    artifact._cleanup = weakref.finalize(artifact, remove)
    parts, files = [], {}
    takes_target = "target" in signature_parameters(chosen.lower).parameters
    options = {"target": target} if takes_target else {}
    whole = program.parts().keys() == {""}
    for index, (path, part) in enumerate(program.parts().items()):
        name = "" if whole else f"part-{index}"
        (folder / name).mkdir(exist_ok=True)
        signature = signature_of(part)
        for file in chosen.lower(part, folder / name, signature, **options):
            files[f"{name}/{file}" if name else file] = _entry(folder / name / file)
        parts.append({"path": path, "folder": name, "signature": signature.as_json()})
    if not whole:
        artifact.module = _eager_of(program)
    artifact.manifest = {
        "schema": SCHEMA,
        "mopt": __version__,
        "model": program.name,
        "backend": backend,
        "target": target,
        "kind": "whole" if whole else "islands",
        "parts": parts,
        "files": files,
    }
    return artifact


def load(
    folder: str | Path,
    *,
    module: nn.Module | None = None,
    threads: int | None = None,
    resident: float | None = None,
    device: str | None = None,
    trust: bool = False,
) -> Loaded:
    """Load an artifact from disk: every hash is checked first, nothing is unpickled.

    ``module`` is the user's model, needed only when parts of it stayed eager. ``resident`` is the
    share of the weights that may be in memory at once, the others being read in every run: only
    the eager backend can, UsageError (``cannot-stream``) elsewhere. ``device`` says where to run
    what the Triton backend lowered ("cpu", "interpreter", "cuda"), and ``trust`` lets binaries from
    the folder run on a GPU; UsageError (``no-device-choice``) elsewhere. Raises ArtifactError for a
    folder that is incomplete, altered or hostile.
    """
    manifest = read_manifest(folder)
    how: dict[str, Any] = {"threads": threads, "resident": resident, "device": device}
    return open_artifact(Path(folder), manifest, module=module, trust=trust, **how)


def read_manifest(folder: str | Path, *, check_hashes: bool = True) -> dict[str, Any]:
    """The manifest of an artifact, checked against the files beside it."""
    with Folder(folder) as opened:
        with opened.open_file(MANIFEST) as file:
            manifest = read_json(file)
        check_manifest(manifest)
        for name, entry in manifest["files"].items():
            with opened.open_file(name) as file:
                if file.size != entry["bytes"]:
                    raise ArtifactError(
                        f"{name} has {file.size} bytes, the manifest says {entry['bytes']}",
                        code="altered-artifact",
                        hint="compile again, or fetch the artifact again",
                    )
                if check_hashes and file.sha256() != entry["sha256"]:
                    raise ArtifactError(
                        f"{name} does not match its hash in the manifest",
                        code="altered-artifact",
                        hint="compile again, or fetch the artifact again",
                    )
    return manifest


def read_report(folder: str | Path) -> Report:
    """The report of an artifact."""
    with Folder(folder) as opened, opened.open_file(REPORT) as file:
        return Report(parse_json(file.read(), name=REPORT, error=ArtifactError))


def open_artifact(
    folder: Path,
    manifest: dict[str, Any],
    *,
    module: nn.Module | None = None,
    threads: int | None = None,
    resident: float | None = None,
    device: str | None = None,
    trust: bool = False,
    apart: bool = False,
) -> Loaded:
    """The callable of an artifact whose manifest was checked."""
    backend = find_backend(manifest["backend"])
    options: dict[str, Any] = {} if resident is None else {"resident": resident}
    known = signature_parameters(backend.open).parameters
    if apart and "apart" in known:
        options["apart"] = True
    if device is not None or trust:
        if "device" not in known:
            raise UsageError(
                f"backend {manifest['backend']!r} runs on the CPU only",
                code="no-device-choice",
                hint="compile with --backend triton for a GPU",
            )
        options |= {"device": device, "trust": trust}
    if resident is not None and "resident" not in known:
        raise UsageError(
            f"backend {manifest['backend']!r} keeps all weights in memory",
            code="cannot-stream",
            hint="compile with --backend eager",
        )
    calls: dict[str, Callable[..., Any]] = {}
    runners: list[Runner] = []
    for part in manifest["parts"]:
        signature = Signature.from_json(part["signature"])
        runner = backend.open(folder / part["folder"], signature, threads=threads, **options)
        runners.append(runner)
        calls[part["path"]] = _caller(runner, signature)

    def close() -> None:
        for runner in runners:
            runner.close()

    if manifest["kind"] == "whole":
        return Loaded(calls[""], close, manifest)
    if module is None:
        close()
        raise UsageError(
            "parts of this model stayed eager, so it needs the original module to run",
            code="needs-module",
            hint="mopt.load(folder, module=model)",
        )
    return Loaded(_with_islands(module, calls, manifest), close, manifest)


def _caller(runner: Runner, signature: Signature) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        flat = signature.flatten(args, kwargs)
        has_tensor = any(isinstance(value, torch.Tensor) for value in flat)
        outputs = runner.run(flat)
        if has_tensor or not flat:
            outputs = [torch.as_tensor(value) for value in outputs]
        else:
            outputs = [value.numpy() if isinstance(value, torch.Tensor) else value
                       for value in outputs]  # fmt: skip
        return signature.unflatten(outputs)

    return call


def _with_islands(
    module: nn.Module, calls: dict[str, Callable[..., Any]], manifest: dict[str, Any]
) -> Callable[..., Any]:
    import torch

    from mopt.islands import with_lowered_calls

    signatures = {
        part["path"]: Signature.from_json(part["signature"]) for part in manifest["parts"]
    }
    wrapped = with_lowered_calls(module, calls, signatures)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return wrapped(*args, **kwargs)

    return run


def _eager_of(program: Program) -> nn.Module:
    islands: IslandProgram = program  # type: ignore[assignment]
    return islands.eager


def _entry(path: Path) -> dict[str, Any]:
    from mopt.safe_read import sha256_of

    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
