"""Memory plans for programs that are no Python: a C header, and TensorFlow Lite Micro's metadata.

Both hold the plan of one graph with inputs, outputs and everything between in one arena.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mopt.errors import InputError, quote

# "OfflineMemoryAllocation" in the metadata of a .tflite file: version, subgraph, count, offsets.
TFLM_METADATA = "OfflineMemoryAllocation"
_TFLM_VERSION = 1
_ONLINE = -1
_INT32 = 2**31


def c_header(plan: Mapping[str, Any], name: str) -> str:
    """A C99 header: arena size, and offset, size and lifetime of every buffer.

    ``plan`` is what plan-memory stores; ``name`` becomes the prefix of everything. Buffers are in
    the order of the plan, with their ids as comments and as an enumeration; a buffer that shares
    another's memory has its offset. Raises InputError (``plan-has-no-arena``) where buffers lie
    outside the arena: only plans made without a backend keep everything in it.
    """
    rows = _arena_rows(plan)
    prefix = identifier(name)
    upper = prefix.upper()
    alignment = 1
    while alignment < 64 and all(row["offset"] % (2 * alignment) == 0 for row in rows):
        alignment *= 2
    enum = _unique(f"{upper}_{identifier(row['id']).upper()}" for row in rows)
    lines = [
        f"/* Memory plan of {_comment(name)}: one arena, {len(rows)} buffers, "
        f"{len(plan['steps'])} steps.",
        " * A buffer holds its value from step lower until before step upper. */",
        f"#ifndef {upper}_MEMORY_PLAN_H",
        f"#define {upper}_MEMORY_PLAN_H",
        "",
        "#include <stdint.h>",
        "",
        f"#define {upper}_ARENA_BYTES {plan['arena_bytes']}u",
        f"#define {upper}_ARENA_ALIGNMENT {alignment}u",
        f"#define {upper}_BUFFERS {len(rows)}u",
        f"#define {upper}_STEPS {len(plan['steps'])}u",
        "",
        "typedef struct {",
        "  uint32_t offset, bytes, lower, upper;",
        f"}} {prefix}_buffer;",
        "",
        f"static const {prefix}_buffer {prefix}_buffers[{max(len(rows), 1)}] = {{",
        *(
            f"  {{{row['offset']}u, {row['bytes']}u, {row['lower']}u, {row['upper']}u}}, "
            f"/* {_comment(row['id'])} */"
            for row in rows
        ),
        *([] if rows else ["  {0u, 0u, 0u, 0u}"]),
        "};",
        "",
        "enum {",
        *(f"  {label} = {index}," for index, label in enumerate(enum)),
        f"  {upper}_NO_BUFFER = {len(rows)}",
        "};",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def tflm_metadata(offsets: Sequence[int | None], *, subgraph: int = 0) -> bytes:
    """The metadata buffer that TensorFlow Lite Micro reads, under the name ``TFLM_METADATA``.

    ``offsets`` has one entry for every tensor of the subgraph, in its order: the byte offset in
    the arena, None for what the interpreter is to place itself (constants among them). The layout
    is an array of little-endian int32: version 1, subgraph, number of offsets, the offsets with -1
    for None. Raises InputError (``offset-too-large``) beyond 31 bits.
    """
    for index, offset in enumerate(offsets):
        if offset is not None and not 0 <= offset < _INT32:
            raise InputError(
                f"offset {offset} of tensor {index} does not fit in 31 bits",
                code="offset-too-large",
            )
    values = [_TFLM_VERSION, subgraph, len(offsets)]
    values += [_ONLINE if offset is None else offset for offset in offsets]
    return struct.pack(f"<{len(values)}i", *values)


def plan_offsets(plan: Mapping[str, Any], tensors: Iterable[str]) -> list[int | None]:
    """The arena offset of every tensor of ``tensors`` (node names), None where it has none.

    A tensor that looks at part of a buffer has the offset of its first byte.
    """
    offsets = {row["id"]: row["offset"] for row in _arena_rows(plan)}
    found: list[int | None] = []
    for name in tensors:
        views = plan["values"].get(name, [])
        if len(views) != 1 or views[0]["buffer"] not in offsets:
            found.append(None)
            continue
        digits = re.search(r"(\d+)$", views[0]["dtype"])
        # Types without a number: bool is one byte.
        bytes_each = int(digits[1]) // 8 if digits else 1
        found.append(offsets[views[0]["buffer"]] + views[0]["first"] * bytes_each)
    return found


def _arena_rows(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    outside = [row["id"] for row in plan["buffers"] if row["where"] != "arena"]
    if outside:
        raise InputError(
            f"{len(outside)} buffers of the plan lie outside its arena, the first is "
            f"{quote(outside[0])}",
            code="plan-has-no-arena",
            hint="make the plan without a backend",
        )
    return list(plan["buffers"])


def identifier(name: str) -> str:
    """A name as a C identifier."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return plain if plain[:1].isalpha() else f"m_{plain}"


def _unique(names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}__{seen[name]}")
    return found


def _comment(text: str) -> str:
    """Text that cannot end a C comment or continue its line."""
    return re.sub(r"[^A-Za-z0-9_.:+ -]", "_", text)
