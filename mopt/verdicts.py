"""What checks found, by content: a second compile of the same model checks nothing twice.

    key = check_key([before, after], [inputs], "pass", bound=1e-4)
    drift = recall(cache, key, lambda: drift_of(...))

A check computes whole models on whole inputs, and most of the time of a compile that finds all else
in the cache. What it found is kept under everything it depends on: graphs and weights, inputs,
mopt's own sources, libraries, processor and threads. A check that fails raises, and keeps nothing.
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mopt.cache import Cache, library_versions, source_hash
from mopt.hashes import tensor_hash
from mopt.json_files import json_bytes
from mopt.machine import machine_fingerprint
from mopt.program import Program

_BUCKET = "checked"
# Operators whose meaning is in the libraries or in mopt; another's may change unseen.
_KNOWN = frozenset({"aten", "prims", "mopt"})


def check_key(
    programs: Iterable[Program], inputs: Iterable[Any], what: str, **more: Any
) -> dict[str, Any] | None:
    """The key of a check of ``programs`` on ``inputs``, ``more`` being JSON data it depends on.

    None where the programs hold what has no content to go by: code outside graphs, or operators
    of other packages.
    """
    given = list(programs)
    if not all(
        program.parts().keys() == {program.path} and _is_known(program) for program in given
    ):
        return None
    machine = machine_fingerprint()
    return {
        "check": what,
        "programs": [program.fingerprint() for program in given],
        # As one hash each: a record's key is read back, and may not grow with the model.
        "inputs": _digest([_hash(leaf) for one in inputs for leaf in pytree.tree_leaves(one)]),
        "more": _digest(more),
        "source": source_hash(*_sources()),
        "libraries": library_versions(),
        "processor": [machine["cpu"], machine["isa"]],
        "threads": torch.get_num_threads(),
    }


def recall(cache: Cache | None, key: dict[str, Any] | None, check: Callable[[], Any]) -> Any:
    """What ``check`` gives (JSON data), or gave before."""
    if cache is None or key is None:
        return check()
    found = cache.get(_BUCKET, key)
    if found is not None:
        return found
    started = time.monotonic()
    found = check()
    if time.monotonic() - started >= cache.worth_seconds:
        with suppress(ValueError):  # NaN among it is no JSON
            cache.put(_BUCKET, key, found)
    return found


def _is_known(program: Program) -> bool:
    for node in program.graph.nodes:
        if node.op == "call_module":
            return False
        target = node.target
        if node.op != "call_function":
            continue
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in _KNOWN:
                return False
        elif getattr(target, "__module__", "") not in (operator.__name__, "_operator", "torch"):
            return False
    return True


def _digest(data: Any) -> str:
    return hashlib.sha256(json_bytes(data)).hexdigest()


def _hash(leaf: Any) -> str:
    return tensor_hash(leaf) if isinstance(leaf, Tensor) else repr(leaf)


@once
def _sources() -> tuple[str, ...]:
    """mopt's own files: operators, what runs them, and the checks."""
    specs = (find_spec("mopt"), find_spec("mopt.backends"))
    roots = [root for spec in specs if spec for root in spec.submodule_search_locations or ()]
    found = {path for root in roots for path in Path(root).rglob("*.py")}
    return tuple(sorted(str(path) for path in found))
