"""mopt diff: what two artifacts differ in, from their reports alone."""

from __future__ import annotations

from pathlib import Path

from tests.cli import report_fixture as made
from tests.cli.command_line import Call


def test_layers_that_differ_are_told(mopt: Call, place: Path) -> None:
    first = [made.layer("a"), made.layer("b", 1), made.layer("gone")]
    second = [
        made.layer("a"),
        made.layer("b", 1, format="int4-g32", bytes_after=1000, why="cheapest"),
        made.layer("new", 3),
    ]
    made.write_artifact(place / "one", made.report(first))
    made.write_artifact(place / "two", made.report(second, result=made.side(1_470_000, 1.0)))
    done = mopt("diff", "one", "two")
    assert done.code == 0, done.err
    assert "2.00x smaller" in done.out
    assert "3 layers differ, 1 are the same" in done.out
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "int8" in lines["b"] and "int4-g32" in lines["b"] and "cheapest" in lines["b"]
    assert "absent" in lines["gone"] and "absent" in lines["new"]
    data = mopt("diff", "one", "two", "--json").document
    assert [row["path"] for row in data["layers"]["changed"]] == ["b", "gone", "new"]
    assert data["rows"][0]["a"] == 2_940_000


def test_times_are_compared_with_their_intervals(mopt: Call, place: Path) -> None:
    made.write_artifact(place / "one")
    made.write_artifact(place / "two")
    assert "no difference" in mopt("diff", "one", "two").out
    faster = {**made.report()["speed"], "ratio": 0.25, "ratio_low": 0.24, "ratio_high": 0.26}
    made.write_artifact(place / "fast", made.report(speed=faster))
    assert "2.00x faster" in mopt("diff", "one", "fast").out


def test_times_of_two_machines_are_not_compared(mopt: Call, place: Path) -> None:
    made.write_artifact(place / "one")
    other = made.report()
    other["environment"]["machine"]["cpu"] = "another processor"
    made.write_artifact(place / "two", other)
    assert (
        "not comparable: cpu: a processor and another processor" in mopt("diff", "one", "two").out
    )


def test_another_model_is_a_warning(mopt: Call, place: Path) -> None:
    made.write_artifact(place / "one")
    made.write_artifact(place / "two", made.report(model="other"))
    assert "two models" in mopt("diff", "one", "two").err
