"""The list of what is in an artifact: its schema, and the check of one that may be a stranger's."""

from __future__ import annotations

from typing import Any

from mopt.errors import ArtifactError, quote
from mopt.signature import Signature

SCHEMA = 1


def check_manifest(manifest: Any) -> None:
    """Raise ArtifactError ``malformed-manifest`` or ``manifest-schema`` unless it is ours."""
    if not isinstance(manifest, dict):
        raise ArtifactError("the manifest is not a table", code="malformed-manifest")
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(
            f"manifest schema {quote(manifest.get('schema'))}, this mopt reads {SCHEMA}",
            code="manifest-schema",
            hint="install the mopt that made it, or compile again",
        )
    texts = ("mopt", "model", "backend", "target", "kind")
    wrong = [key for key in texts if not isinstance(manifest.get(key), str)]
    if not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        wrong.append("files")
    if not isinstance(manifest.get("parts"), list) or not manifest["parts"]:
        wrong.append("parts")
    if wrong or manifest["kind"] not in ("whole", "islands"):
        raise ArtifactError(f"the manifest lacks {wrong or 'kind'}", code="malformed-manifest")
    for name, entry in manifest["files"].items():
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("bytes"), int)
            or not isinstance(entry.get("sha256"), str)
        ):
            raise ArtifactError(f"bad entry for file {quote(name)}", code="malformed-manifest")
    paths = []
    for part in manifest["parts"]:
        keys = {"path", "folder", "signature"}
        if not isinstance(part, dict) or set(part) != keys or not (
            isinstance(part["path"], str) and isinstance(part["folder"], str)
        ):  # fmt: skip
            raise ArtifactError("a part is malformed", code="malformed-manifest")
        if part["folder"] and not any(
            n.startswith(part["folder"] + "/") for n in manifest["files"]
        ):
            raise ArtifactError(
                f"part folder {quote(part['folder'])} holds no listed file",
                code="malformed-manifest",
            )
        paths.append(part["path"])
        Signature.from_json(part["signature"])
    if manifest["kind"] == "whole" and paths != [""]:
        raise ArtifactError("a whole model has exactly one part", code="malformed-manifest")
