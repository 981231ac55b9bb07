"""JSON from strangers: bounded in time and memory, and never more lenient than JSON."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopt.errors import ArtifactError, InputError, LimitError, MoptError
from mopt.json_files import json_bytes, parse_json, read_json
from mopt.limits import DEFAULT_LIMITS

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    data = json_bytes(value)
    assert parse_json(data, name="x.json") == value
    assert json_bytes(value, indent=None).endswith(b"\n")


def test_same_value_same_bytes() -> None:
    assert json_bytes({"b": 1, "a": [1.5, "é"]}) == json_bytes({"a": [1.5, "é"], "b": 1})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_bytes({"x": bad})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "json-syntax"),
        (b"{", "json-syntax"),
        (b"[1,]", "json-syntax"),
        (b'{"a": 1} x', "json-syntax"),
        (b'"abc', "json-syntax"),
        (b'"abc\\', "json-syntax"),
        (b"\xef\xbb\xbf{}", "json-syntax"),
        (b"\xff", "json-encoding"),
        (b'"\\ud800"', "json-encoding"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "json-duplicate-key"),
        (b"[NaN]", "json-number"),
        (b"[-Infinity]", "json-number"),
        (b"1e999", "json-number"),
        (b"9007199254740993", "json-number"),
        (b"1" * 100_000, "json-number"),
        (b"[" * 100_000, "json-too-deep"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "json-too-deep"),
        (b'"' + b"x" * 4097 + b'"', "json-too-large"),
        (b"[" + b"1," * 200_000 + b"1]", "json-too-large"),
        (b" " * (DEFAULT_LIMITS.json_bytes + 1), "json-too-large"),
    ],
    ids=lambda v: v if isinstance(v, str) else repr(v[:20]),
)
def test_refused_by_code(text: bytes, code: str) -> None:
    with pytest.raises(MoptError) as caught:
        parse_json(text, name="plan.json")
    assert caught.value.code == code
    assert "plan.json" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_limits_are_reached_and_not_before() -> None:
    deep = b"[" * 32 + b"]" * 32
    assert parse_json(deep, name="x")
    assert parse_json(b'["' + b"x" * 4096 + b'"]', name="x") == ["x" * 4096]
    assert parse_json(b'"' + b"\\u0041" * 4096 + b'"', name="x") == "A" * 4096
    assert parse_json(b'{"a[[[[": "]]],,,,\\"{{"}', name="x") == {"a[[[[": ']]],,,,"{{'}
    assert parse_json(b"[9007199254740992, -0.0]", name="x") == [2**53, 0.0]


def test_errors_take_the_callers_class_and_the_line() -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_json(b'{\n"a": 1,\n"b" 2}', name="manifest.json", error=ArtifactError)
    assert caught.value.site == "manifest.json:3"


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b'\\"' * 2_000_000,
        b'["' + b'","' * 1_000_000,
        b"[" + b"{}," * 1_390_000 + b"0]",
        b"\\" * 4_000_000,
        b'""' * 2_000_000,
    ],
    ids=lambda d: repr(d[:12]),
)
def test_hostile_documents_are_refused_in_linear_time(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(MoptError):
        parse_json(data, name="x.json")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b'"aa",' * 199_000 + b"0]",
        b"{" + b",".join(b'"%05d":"%05d"' % (i, i) for i in range(90_000)) + b"}",
        b"[" + b"[]," * 99_000 + b"0]",
    ],
    ids=lambda d: repr(d[:12]),
)
def test_the_largest_documents_stay_small_in_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        parse_json(data, name="x.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (64 << 20) + 4 * len(data)


def test_mutated_documents_never_escape_as_other_errors() -> None:
    rng = random.Random(0)
    seed = bytearray(json_bytes({"a": [1, 2.5, None, "x\n\u2028"], "b": {"c": True, "d": -1e-3}}))
    for _ in range(3000):
        data = bytearray(seed)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        try:
            value = parse_json(bytes(data), name="x")
        except MoptError:
            continue
        assert json.loads(data) == value


def test_reading_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json_bytes({"x": 1}))
    assert read_json(path) == {"x": 1}
    with pytest.raises(LimitError):
        read_json(path, max_bytes=3)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "b.json")
    assert caught.value.code == "file-not-found"
