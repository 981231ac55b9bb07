"""Loading a stranger's artifact once where it can do no harm, before it is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopt.registry import find_backend


def probe_artifact(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Load every part in a child process with limits, where its runtime is code that may crash.

    ``manifest`` was checked. What ends the child, takes too long or more memory than a sound model
    of that size is a LimitError or ArtifactError here.
    """
    probe = getattr(find_backend(manifest["backend"]), "probe", None)
    if probe is None:
        return
    for part in manifest["parts"]:
        probe(Path(folder) / part["folder"])
