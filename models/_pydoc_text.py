"""The text behind `pydoc-gpt`: what `pydoc` shows, cut into training and held-out parts."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SECTION_BYTES = 4096
HELDOUT_BYTES = 65_536 + 1
CALIBRATION_BYTES = 131_072 + 1
VALIDATION_BYTES = 24_576 + 1
SHARED_LENGTH = 50
NOT_LIBRARY = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


@dataclass(frozen=True, kw_only=True)
class PydocText:
    """Bytes as uint8 tensors.

    `topics` and `docstrings` are for training; `calibration` is a part of `topics`; `validation`
    and `heldout` share no run of SHARED_LENGTH characters with them.
    """

    topics: Tensor
    docstrings: Tensor
    calibration: Tensor
    validation: Tensor
    heldout: Tensor


def collect() -> PydocText:
    """Read the running Python's topics and its standard library's docstrings.

    Topics quote each other at length, so a paragraph is kept only where it appears first, longest
    topic first; then the document is cut into sections of whole paragraphs, of which about a
    quarter is set aside, and training paragraphs that still quote one set aside are dropped.
    """
    from pydoc_data.topics import topics

    by_length = sorted(topics, key=lambda name: (-len(topics[name]), name))
    paragraphs = _without_repeats(p for name in by_length for p in _paragraphs(topics[name]))
    sections = _sections(paragraphs)
    count = -(-(HELDOUT_BYTES + VALIDATION_BYTES) // SECTION_BYTES)
    chosen = {(2 * i + 1) * len(sections) // (2 * count) for i in range(count)}
    aside = [sections[index] for index in sorted(chosen)]
    # Validation takes every fourth section set aside, so that both parts spread over the document.
    validation = aside[1::4]
    heldout = [section for index, section in enumerate(aside) if index % 4 != 1]
    unseen = _runs(p for section in aside for p in section)
    kept = [
        [p for p in section if not unseen & _runs([p])]
        for index, section in enumerate(sections)
        if index not in chosen
    ]
    docstrings = _without_repeats(p for text in _docstrings() for p in _paragraphs(text))
    calibration = kept[:: max(1, sum(map(_size, kept)) // (CALIBRATION_BYTES + SECTION_BYTES))]
    return PydocText(
        topics=_encode(kept),
        docstrings=_encode([[p for p in docstrings if not unseen & _runs([p])]]),
        calibration=_encode(calibration)[:CALIBRATION_BYTES],
        validation=_encode(validation)[:VALIDATION_BYTES],
        heldout=_encode(heldout)[:HELDOUT_BYTES],
    )


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if NOT_LIBRARY & set(path.relative_to(root).parts):
            continue
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and (text := ast.get_docstring(node)):
                yield text


def _paragraphs(text: str) -> Iterator[str]:
    return (p.strip("\n").rstrip() for p in text.split("\n\n") if p.strip())


def _without_repeats(paragraphs: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for paragraph in paragraphs:
        first.setdefault(" ".join(paragraph.split()), paragraph)
    return list(first.values())


def _sections(paragraphs: list[str]) -> list[list[str]]:
    sections: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if _size(sections[-1]) >= SECTION_BYTES:
            sections.append([])
        sections[-1].append(paragraph)
    return sections


def _size(section: list[str]) -> int:
    return sum(len(p.encode()) + 2 for p in section)


def _runs(paragraphs: Iterable[str]) -> set[str]:
    """Every run of SHARED_LENGTH characters, white space aside."""
    found: set[str] = set()
    for paragraph in paragraphs:
        flat = " ".join(paragraph.split())
        found.update(flat[i : i + SHARED_LENGTH] for i in range(len(flat) - SHARED_LENGTH + 1))
    return found


def _encode(sections: list[list[str]]) -> Tensor:
    text = "\n\n".join(p for section in sections for p in section).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
