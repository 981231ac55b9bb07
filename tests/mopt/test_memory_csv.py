"""Buffers in and out of CSV; every complaint says where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from mopt.errors import InputError, LimitError, UsageError
from mopt.limits import DEFAULT_LIMITS
from mopt.memory import Buffer, Gap, MemoryPlan, MemoryProblem, Status
from mopt.memory_csv import parse_buffers, read_buffers, solution_csv
from tests.passes.schedule.problems import problems


def test_the_plain_format() -> None:
    problem = parse_buffers(b"id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\n", 12)
    assert problem.buffers == (Buffer("b1", 0, 3, 4), Buffer("b2", 3, 9, 4))
    assert problem.capacity == 12


def test_all_columns_in_any_order_with_blanks_and_windows_line_ends() -> None:
    text = "\ufeffsize, id ,alignment,lower,upper,gaps,hint,offset\r\n\r\n"
    text += "64, a ,8,0,9,2-4 6-7@0:16,128,\r\n32,b,,1,2,,,64\r\n"
    problem = parse_buffers(text.encode())
    gaps = (Gap(2, 4), Gap(6, 7, (0, 16)))
    assert problem.buffers == (
        Buffer("a", 0, 9, 64, 8, gaps, hint=128), Buffer("b", 1, 2, 32, offset=64),
    )  # fmt: skip


def test_older_names_and_inclusive_ends() -> None:
    problem = parse_buffers(b"buffer_id,start,end,size,gaps\na,0,3,8,1-2\n")
    assert problem.buffers == (Buffer("a", 0, 4, 8, gaps=(Gap(1, 3),)),)


@pytest.mark.parametrize(
    ("text", "place", "code", "words"),
    [
        ("", "1:1", "csv-header", "the file is empty"),
        ("id,lower,size\n", "1:1", "csv-header", "names no column upper"),
        ("id,lower,upper,size,colour\n", "1:21", "csv-header", "no column is called 'colour'"),
        ("id,lower,start,upper,size\n", "1:10", "csv-header", "two columns hold the lower"),
        ("id,lower,upper,size\na,0,3\n", "2:5", "csv-fields", "3 fields, the first line names 4"),
        ("id,lower,upper,size\na,0,3,4,5\n", "2:9", "csv-fields", "the line has 5 fields"),
        ("id,lower,upper,size\na,0,3,4\nb,1,x,4\n", "3:5", "csv-number", "found 'x'"),
        ("id,lower,upper,size\na,0,,4\n", "2:5", "csv-number", "the field is empty"),
        ("id,lower,upper,size\na,0,3.5,4\n", "2:5", "csv-number", "a whole number"),
        ("id,lower,upper,size\na,0,3," + "9" * 30 + "\n", "2:7", "csv-number", "size must be"),
        ("id,lower,upper,size\n,0,3,4\n", "2:1", "csv-name", "no name"),
        ("id,lower,upper,size\na,0,3,4\na,1,2,3\n", "3:1", "duplicate-buffer", "on line 2"),
        ("id,lower,upper,size\na,-1,3,4\n", "2:3", "buffer-lifetime", "starts at -1"),
        ("id,lower,upper,size\na,5,3,4\n", "2:5", "buffer-lifetime", "[5, 3) is negative"),
        ("id,lower,upper,size\na,0,3,-4\n", "2:7", "buffer-size", "size -4 is negative"),
        ("id,lower,upper,size\na,0,3,9223372036854775807\n", "2:7", "buffer-size", "beyond"),
        ("id,lower,upper,size,alignment\na,0,3,4,3\n", "2:9", "buffer-alignment", "power of two"),
        ("id,lower,upper,size,gaps\na,0,9,4,2to3\n", "2:9", "csv-gap", "'2to3' is no gap"),
        ("id,lower,upper,size,gaps\na,0,9,4,2-99\n", "2:9", "buffer-gap", "outside the lifetime"),
    ],
)
def test_malformed_csv_names_line_and_column(text: str, place: str, code: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_buffers(text.encode(), name="x.csv")
    assert caught.value.code == code
    assert caught.value.site == f"x.csv:{place}"
    assert words in caught.value.message


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(InputError) as caught:
        parse_buffers(b"id,lower,upper,size\na,0,\xff,4\n", name="x.csv")
    assert (caught.value.code, caught.value.site) == ("csv-encoding", "x.csv:2:5")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("id,lower,upper,size\n")
    assert read_buffers(tmp_path / "b.csv").buffers == ()
    with pytest.raises(LimitError):
        read_buffers(tmp_path / "b.csv", limits=replace(DEFAULT_LIMITS, csv_bytes=4))


@given(problems())
def test_a_solution_reads_back_as_the_fixed_problem(problem: MemoryProblem) -> None:
    kept = MemoryProblem(tuple(b for b in problem.buffers if b.alias is None))
    offsets = {b.id: 8 * k for k, b in enumerate(kept.buffers)}
    plan = MemoryPlan(offsets, 0, 0, Status.FEASIBLE, "hand")
    again = parse_buffers(solution_csv(kept, plan).encode()).buffers
    assert again == tuple(replace(b, offset=offsets[b.id], hint=None) for b in kept.buffers)


def test_a_name_that_csv_cannot_hold() -> None:
    problem = MemoryProblem((Buffer("a,b", 0, 1, 1),))
    with pytest.raises(UsageError) as caught:
        solution_csv(problem, MemoryPlan({"a,b": 0}, 1, 1, Status.OPTIMAL, "hand"))
    assert caught.value.code == "csv-name"
