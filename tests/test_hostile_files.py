"""A few damaged files for everything that reads files; ``benchmarks/fuzzing.py`` gives it more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mutations import mutate
from tests.parsers import NAMES, Parser, check, make_parser

_MANIFEST = b"""{"schema": 1, "mopt": "", "model": "", "backend": "", "target": "", "kind": "whole",
"files": {"a": {"bytes": 0, "sha256": ""}},
"parts": [{"path": "", "folder": %b, "signature": {"inputs": [], "outputs": []}}]}"""
# Inputs that something went wrong with once, and what is at the edge of the rules.
_KNOWN = {
    "recipe": [b'extends = "recipe.toml"', b'extends = "../../etc/x.toml"', b'name = "a'],
    "manifest": [_MANIFEST % b"4", _MANIFEST % b"[]", _MANIFEST % b'"../x"'],
    "budget": [b"size<=1e999MB", b"size<=" + b"9" * 400, b"size<=0x", "quality>=\u0966".encode()],
    "csv": [b"", b"id,lower,upper,size\n" + b"a,0,1,1\n" * 2, b"id\n"],
    "layout": [b"{}", b'{"schema": 1, "arena_bytes": 0, "beside_bytes": 0, "steps": [], "buffers": '
               b'[], "values": {"x": []}, "inputs": ["x"], "dynamic": false}'],
    "npy": [b"", b"\x93NUMPY\1\0\x3c\0"
            b"{'descr': '<b4', 'fortran_order': False, 'shape': (1,), }  \n"],
    "npz": [b"", b"PK\x05\x06" + b"\xff" * 18],
    "report": [b"{}", b"[]", b'{"schema": 1e400}', b"[" * 100_000],
    "onnx": [b"", b"\x0a\xff\xff\xff\xff\x0f"],
    "safetensors": [b"", b"\xff" * 8],
    "graph": [b'{"schema": 1, "nodes": [{"name": "a", "op": "call_function", "target": 1e308}]}'],
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def parser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parser:
    return make_parser(request.param, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def test_sound_files_are_read(parser: Parser, place: Path) -> None:
    assert all(check(parser, seed, place) for seed in parser.seeds[:3])


def test_known_cases_are_refused(parser: Parser, place: Path) -> None:
    for data in _KNOWN.get(parser.name, []):
        assert not check(parser, data, place)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_damaged_files_end_in_an_answer_or_an_error(parser: Parser, place: Path, seed: int) -> None:
    check(parser, mutate(parser.seeds, random.Random(seed)), place)
    assert {path.suffix for path in place.iterdir()} <= {
        ".json", ".toml", ".onnx", ".npz", ".npy", ".safetensors", ".cubin", ""
    }  # fmt: skip
