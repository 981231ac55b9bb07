"""mopt plan: buffers in, offsets out, and why they do not fit."""

from __future__ import annotations

from pathlib import Path

from mopt.memory_csv import read_buffers
from tests.cli.command_line import Call

BUFFERS = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


def test_buffers_get_offsets_within_the_capacity(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    done = mopt("plan", "b.csv", "--capacity", "12", "-o", "s.csv")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "5 buffers in 12 bytes, proved least, written to s.csv"
    lines = (place / "s.csv").read_text().splitlines()
    assert lines[0] == "id,lower,upper,size,offset"
    assert lines[1].startswith("b1,0,3,4,")
    # A solution is a problem in which everything is fixed: planning it again checks it.
    again = mopt("plan", "s.csv", "--capacity", "12", "--json")
    assert again.code == 0
    offsets = {b.id: b.offset for b in read_buffers(place / "s.csv").buffers}
    assert again.document["offsets"] == offsets


def test_the_document_has_all_of_the_plan(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    data = mopt("plan", "b.csv", "--json").document
    assert data["status"] == "optimal"
    assert (data["peak"], data["lower_bound"], data["gap"]) == (12, 12, 0.0)
    assert data["binding"] == {
        "bytes": 12, "lower": 0, "upper": 3, "buffers": ["b1", "b3", "b5"],
    }  # fmt: skip
    assert data["capacity"] is None


def test_quiet_is_one_line_and_verbose_has_the_table(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    assert mopt("plan", "b.csv", "-q").out == "5 buffers in 12 bytes, proved least\n"
    table = mopt("plan", "b.csv", "-v").out
    assert "buffer" in table.splitlines()[0]
    assert len(table.splitlines()) > 9


def test_too_little_room_exits_1_and_names_moment_and_buffers(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    done = mopt("plan", "b.csv", "--capacity", "11", "-o", "s.csv")
    assert done.code == 1
    assert (
        "error[does-not-fit]: the buffers do not fit into 11 bytes: in steps 0 to 2, 12 bytes"
        in (done.err)
    )
    assert "b1 (4), b3 (4), b5 (4)" in done.err
    assert not (place / "s.csv").exists()
    document = mopt("plan", "b.csv", "--capacity", "11", "--json")
    assert (document.code, document.document["status"]) == (1, "infeasible")


def test_what_only_the_search_can_prove(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text("id,lower,upper,size,offset\na,0,4,4,4\nb,1,3,6,\nc,2,5,2,\n")
    assert mopt("plan", "b.csv").out.splitlines()[2] == "  bound    14 bytes, proved by search"
    done = mopt("plan", "b.csv", "--capacity", "13")
    assert done.code == 1
    assert "no layout fits into 13 bytes, proved by search: at least 14 bytes" in done.err
    assert "In step 2, 12 bytes are needed at once: b (6), a (4), c (2)" in done.err


def test_malformed_csv_is_an_error_with_its_place(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text("id,lower,upper,size\nb1,0,three,4\n")
    done = mopt("plan", "b.csv")
    assert done.code == 2
    assert "error[csv-number]: upper must be a whole number, found 'three'" in done.err
    assert "at b.csv:2:6" in done.err
    assert mopt("plan", "missing.csv").code == 2


def test_an_output_that_cannot_be_written(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    done = mopt("plan", "b.csv", "-o", "missing/s.csv")
    assert done.code == 2
    assert "error[folder-not-found]" in done.err
    (place / "empty.csv").write_text("id,lower,upper,size\n")
    assert mopt("plan", "empty.csv", "-q").out == "0 buffers in 0 bytes, proved least\n"


def test_capacities_have_units(mopt: Call, place: Path) -> None:
    (place / "b.csv").write_text(BUFFERS)
    assert mopt("plan", "b.csv", "--capacity", "1.5KiB", "--json").document["capacity"] == 1536
    assert mopt("plan", "b.csv", "--capacity", "2 kB", "--json").document["capacity"] == 2000
    done = mopt("plan", "b.csv", "--capacity", "12 apples")
    assert done.code == 2
    assert "no number of bytes" in done.err
