"""``kernels.json`` and the binaries beside it: what a lowering decided, as an artifact keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopt.backends.triton.aot import Binary, triton_version
from mopt.backends.triton.architectures import ARCHITECTURES
from mopt.backends.triton.launch import Tile, read_tile
from mopt.backends.triton.plan import Plan
from mopt.errors import ArtifactError, quote
from mopt.json_files import json_bytes, parse_json
from mopt.safe_read import Folder

KERNELS = "kernels.json"
FOLDER = "kernels"
SCHEMA = 1
_FACTS = ("name", "architecture", "shared", "threads", "registers", "spills", "scratch", "order",
          "types", "aligned", "constants", "warps", "stages")  # fmt: skip


@dataclass(frozen=True)
class StoredKernels:
    """What an artifact says of its kernels; code is read when it is asked for."""

    triton: str
    target: str
    tables: Mapping[str, Mapping[str, Mapping[int, Tile]]]
    binaries: Mapping[str, Mapping[str, Mapping[str, Any]]]
    values: Mapping[str, Any]
    data: Mapping[str, Any]


def write_kernels(plan: Plan, folder: Path) -> list[str]:
    """Write the file and the binaries; the names of what was written."""
    files = [KERNELS]
    entries: dict[str, dict[str, Any]] = {}
    for arch_name, binaries in plan.binaries.items():
        arch = ARCHITECTURES[arch_name]
        (folder / FOLDER / arch_name).mkdir(parents=True, exist_ok=True)
        for key, binary in sorted(binaries.items()):
            stem = f"{FOLDER}/{arch_name}/{binary.name}-{key[:12]}"
            (folder / f"{stem}.{arch.binary}").write_bytes(binary.code)
            (folder / f"{stem}.{arch.assembly}").write_text(binary.assembly, encoding="utf-8")
            files += [f"{stem}.{arch.binary}", f"{stem}.{arch.assembly}"]
            facts = {name: getattr(binary, name) for name in _FACTS}
            entries.setdefault(arch_name, {})[key] = {**facts, "file": f"{stem}.{arch.binary}"}
    tables = {
        arch: {key: [[rows, tile.as_json()] for rows, tile in found.items()]
               for key, found in by_key.items()}
        for arch, by_key in plan.tables.items()
    }  # fmt: skip
    data = {
        "schema": SCHEMA,
        "triton": triton_version(),
        "target": plan.target,
        "lowered": [vars(one) for one in plan.lowered],
        "left": [{"site": s, "operator": o, "reason": r} for s, o, r in plan.left],
        "pytorch": plan.pytorch,
        "share": plan.share,
        "checked": plan.checked,
        "rejected": [vars(one) for one in plan.rejected],
        "measured": plan.measured,
        "values": plan.values,
        "tables": tables,
        "binaries": entries,
    }
    (folder / KERNELS).write_bytes(json_bytes(data))
    return files


def read_kernels(folder: Folder) -> StoredKernels:
    """The file of an artifact. Raises ArtifactError ``malformed-kernels``."""
    with folder.open_file(KERNELS) as file:
        data = parse_json(file.read(), name=KERNELS, error=ArtifactError,
                          max_bytes=16 << 20, max_values=2_000_000)  # fmt: skip
    try:
        if data["schema"] != SCHEMA:
            raise ArtifactError(
                f"{KERNELS} has schema {quote(data['schema'])}, this mopt reads {SCHEMA}",
                code="malformed-kernels",
                hint="install the mopt that made it, or compile again",
            )
        tables = {
            str(arch): {str(key): {int(rows): read_tile(tile) for rows, tile in found}
                        for key, found in by_key.items()}
            for arch, by_key in data["tables"].items()
        }  # fmt: skip
        binaries = {
            str(arch): {str(key): dict(entry) for key, entry in found.items()}
            for arch, found in data["binaries"].items()
        }
        triton, target = str(data["triton"]), str(data["target"])
        values = dict(data["values"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{KERNELS} is malformed", code="malformed-kernels") from error
    return StoredKernels(triton, target, tables, binaries, values, data)


def read_binary(folder: Folder, entry: Mapping[str, Any]) -> Binary:
    """A binary of an artifact, for code that may run on the GPU. Raises ArtifactError."""
    try:
        facts = {name: entry[name] for name in _FACTS}
        for name in ("order", "types", "aligned"):
            facts[name] = tuple(str(part) for part in facts[name])
        numbers = ("shared", "threads", "registers", "spills", "scratch", "warps", "stages")
        if not all(isinstance(facts[name], int) and facts[name] >= 0 for name in numbers):
            raise ValueError(entry)
        file_name = str(entry["file"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("a kernel's entry is malformed", code="malformed-kernels") from error
    with folder.open_file(file_name) as file:
        return Binary(code=file.read(), assembly="", **facts)
