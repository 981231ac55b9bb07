"""Every limit on what mopt reads from strangers' files, in one place.

``DEFAULT_LIMITS`` holds the defaults; ``parse_limits(["json-depth=64"])`` gives a changed set, as
``--limit NAME=VALUE`` on the command line does. Readers take ``limits=`` and never look
elsewhere. Sizes are bytes; values may be written with a suffix (``64MiB``, ``1GB``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from mopt.errors import UsageError, quote, unknown_name

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
}


def _limit(default: int, meaning: str) -> int:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds the readers of strangers' files keep; ``help`` of each field says what it bounds."""

    path_segments: int = _limit(8, "segments of a path named inside a file")
    segment_chars: int = _limit(121, "characters of one such segment")

    json_bytes: int = _limit(4 * MIB, "size of a JSON file")
    json_plan_bytes: int = _limit(64 * MIB, "size of a plan.json")
    json_depth: int = _limit(32, "nesting of a JSON file")
    json_string: int = _limit(4096, "characters of one JSON string")
    json_values: int = _limit(200_000, "values in a JSON file")
    json_plan_values: int = _limit(1_500_000, "values in a plan.json")

    toml_bytes: int = _limit(MIB, "size of a TOML file")
    toml_depth: int = _limit(16, "nesting of a TOML file, and parts of one dotted key")
    toml_keys: int = _limit(10_000, "keys and tables in a TOML file")
    toml_string: int = _limit(65_536, "characters of one TOML string")

    csv_bytes: int = _limit(64 * MIB, "size of a CSV file of buffers")

    safetensors_header: int = _limit(16 * MIB, "size of a safetensors header")
    safetensors_tensors: int = _limit(200_000, "tensors in a safetensors file")
    safetensors_name: int = _limit(512, "characters of a tensor name")
    tensor_rank: int = _limit(32, "dimensions of a tensor")

    npz_members: int = _limit(1024, "arrays in an npz file")
    input_bytes: int = _limit(4 * GIB, "real size of all arrays of an input file together")
    inflate_ratio: int = _limit(100, "real size over stored size, above inflate_free bytes")
    inflate_free: int = _limit(64 * MIB, "real size below which the ratio is not looked at")

    onnx_bytes: int = _limit(2 * GIB - 1, "size of an ONNX model file (protobuf's own limit)")
    onnx_graph_bytes: int = _limit(64 * MIB, "an ONNX model besides its initializers")
    onnx_nodes: int = _limit(1_000_000, "nodes of an ONNX model, subgraphs included")
    onnx_depth: int = _limit(4, "subgraphs within subgraphs of an ONNX model")
    onnx_attribute: int = _limit(MIB, "size of one attribute of an ONNX node")
    onnx_ports: int = _limit(4096, "inputs plus outputs of an ONNX model")
    onnx_value_bytes: int = _limit(2 * GIB, "any value of an ONNX model with a fixed shape")
    fold_bytes: int = _limit(64 * MIB, "what constant folding may create beyond 64x the model")

    child_output: int = _limit(MIB, "what a child process may print")
    parse_seconds: int = _limit(10, "time to parse a stranger's file")
    load_seconds: int = _limit(60, "time to load a stranger's model")


DEFAULT_LIMITS = Limits()


def parse_limits(settings: Iterable[str], base: Limits = DEFAULT_LIMITS) -> Limits:
    """``base`` with each ``name=value`` applied; ``-`` and ``_`` are the same in names.

    Raises UsageError (``limit-syntax``, ``unknown-limit``) for what it cannot read.
    """
    known = {f.name.replace("_", "-"): f.name for f in fields(Limits)}
    changed: dict[str, int] = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        shown = name.strip().replace("_", "-")
        match = re.fullmatch(r"(\d{1,18})\s*([a-z]*)", value.strip().lower())
        if not sign or match is None or match[2] not in _UNITS:
            raise UsageError(
                f"a limit is NAME=VALUE with a whole number, got {quote(setting)}",
                code="limit-syntax",
                hint="for example json-bytes=8MiB",
            )
        if shown not in known:
            raise unknown_name("limit", shown, known, "see the list of limits in the docs")
        changed[known[shown]] = int(match[1]) * _UNITS[match[2]]
    return replace(base, **changed)
