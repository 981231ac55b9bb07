"""TOML from strangers: bounded, and every mistake has a file and a line."""

from __future__ import annotations

import random
import time
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from mopt.errors import InputError, LimitError, MoptError, UsageError
from mopt.toml_files import parse_toml, read_toml

RECIPE = b'''\
name = "mine"  # a.b.c = [[[
"quoted.key".sub = 1.5
when = 2026-01-02
text = """
[not.a.table]
key = 1
"""
list = [
  { a = 1, b = [2, 3] },
  4.5,
]

[[pass]]
name = "fold-constants"
[[pass]]
name = 'quantize.weights'
bits = 4
[pass.extra]
group = 32
[device.cpu]
cores = 2
'''


def test_values_and_lines() -> None:
    file = parse_toml(RECIPE, name="recipe.toml")
    assert file.data == tomllib.loads(RECIPE.decode())
    for path, line in [
        (("name",), 1),
        (("quoted.key", "sub"), 2),
        (("text",), 4),
        (("list",), 8),
        (("pass", 0, "name"), 14),
        (("pass", 1, "bits"), 17),
        (("pass", 1, "extra", "group"), 19),
        (("device", "cpu", "cores"), 21),
        (("device",), 20),
    ]:
        assert file.site(*path) == f"recipe.toml:{line}", path
    assert file.site("pass", 1, "never") == "recipe.toml:15", "the nearest parent"
    assert file.site("never") == "recipe.toml"


@pytest.mark.parametrize(
    ("text", "code", "site"),
    [
        (b"a = 1\nb = \n", "toml-syntax", "r.toml:2:5"),
        (b"a = 1\na = 2\n", "toml-syntax", "r.toml:2:6"),
        (b"a = 1\nb", "toml-syntax", "r.toml:2"),
        (b"a = 1\nb = '\xff'", "toml-encoding", "r.toml:2"),
        (b"a = 1\n[t]\nb.c = inf", "toml-number", "r.toml:3"),
        (b"a = [1, nan]", "toml-number", "r.toml:1"),
        (b"\na = 1e400", "toml-number", "r.toml:2"),
        (b"a = 9007199254740993", "toml-number", "r.toml:1"),
        (b"a = " + b"9" * 50_000, "toml-syntax", "r.toml"),
        (b"a = 0x" + b"f" * 50_000, "toml-number", "r.toml:1"),
        (b"a = 1\nb = " + b"[" * 50_000, "toml-too-deep", "r.toml:2"),
        (b"\n" + b".".join([b"a"] * 50_000) + b" = 1", "toml-too-deep", "r.toml:2"),
        (b"a.a.a.a.a.a.a.a.a.b = { c.c.c.c.c.c.c.c.c = 1 }", "toml-too-deep", "r.toml:1"),
        (b"".join(b"k%d = 1\n" % i for i in range(10_001)), "toml-too-large", "r.toml:10001"),
        (b"a = '" + b"x" * 70_000 + b"'", "toml-too-large", "r.toml:1"),
        (b"#" * (1 << 20) + b"#", "toml-too-large", None),
    ],
    ids=lambda v: repr(v[:24]) if isinstance(v, bytes) else None,
)
def test_refused_with_code_and_line(text: bytes, code: str, site: str | None) -> None:
    with pytest.raises(MoptError) as caught:
        parse_toml(text, name="r.toml")
    assert (caught.value.code, caught.value.site) == (code, site)
    assert len(str(caught.value)) < 300


def test_headers_that_deepen_are_cheap() -> None:
    """1,500 of them take tomllib 3.5 s; here they are refused at the 17th."""
    text, parts = [], []
    for _ in range(1500):
        parts.append("a")
        text.append("[" + ".".join(parts) + "]\n")
    start = time.process_time()
    with pytest.raises(LimitError):
        parse_toml("".join(text), name="r.toml")
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        b'a = "' + b'\\"' * 500_000,
        b'"""' * 300_000,
        b"'" * 1_000_000,
        b"\n" * 1_000_000,
        b"a=1#" * 9_000 + b"\n",
        b"[a]\n" * 9_000,
        b"".join(b"[t%d.a.b]\nx.y.z = %d\n" % (i, i) for i in range(4_900)),
        b"[[t]]\n" * 9_900,
    ],
    ids=lambda v: repr(v[:12]),
)
def test_hostile_sizes_stay_cheap(text: bytes) -> None:
    start = time.process_time()
    with suppress(MoptError):
        parse_toml(text, name="r.toml")
    assert time.process_time() - start < 5


def test_mutated_documents_never_escape_as_other_errors() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(RECIPE)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        try:
            parse_toml(bytes(data), name="r.toml").site("pass", 0)
        except MoptError:
            continue


def test_reading_files_and_the_callers_class(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(RECIPE.replace(b"\n", b"\r\n"))
    file = read_toml(tmp_path / "a.toml")
    assert file.data["name"] == "mine"
    assert file.site("device").endswith("a.toml:20")
    with pytest.raises(InputError) as caught:
        read_toml(tmp_path / "b.toml")
    assert caught.value.code == "file-not-found"
    with pytest.raises(UsageError):
        parse_toml("a", name="x", error=UsageError)
