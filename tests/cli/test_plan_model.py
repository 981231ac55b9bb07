"""mopt plan of a model: one arena or two memories, as a table, JSON, a C header and metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tests.cli.command_line import Call


def test_a_model_is_planned(mopt: Call, net: str, place: Path) -> None:
    files = ("-o", "plan.json", "--header", "net_plan.h", "--tflm", "plan.bin")
    done = mopt("plan", net, *files)
    assert done.code == 0
    # The input with the first result; the activation takes over the result's memory.
    lines = [line.split() for line in done.out.splitlines()]
    assert ["arena", "5.00", "KiB"] in lines
    assert ["no", "plan", "goes", "below", "5.00", "KiB", "reached"] in lines
    assert "other sizes need a plan of their own" in done.out
    plan = json.loads((place / "plan.json").read_text())
    assert plan["arena_bytes"] == plan["lower_bound_bytes"] == 4 * (256 + 64) * 4
    assert "#define NET_PLAN_ARENA_BYTES 5120u" in (place / "net_plan.h").read_text()
    values = struct.unpack("<11i", (place / "plan.bin").read_bytes())
    assert values[:3] == (1, 0, 8)
    assert mopt("plan", net, "--json").document["peak_bytes"] == 5120


def test_moves_between_two_memories_are_planned(mopt: Call, net: str, place: Path) -> None:
    done = mopt("plan", net, "--fast-memory", "50%", "-o", "plan.json")
    assert done.code == 0
    assert "no plan moves fewer" in done.out and "hold everything" in done.out
    plan = json.loads((place / "plan.json").read_text())
    assert plan["status"] == "optimal"
    assert plan["fast_bytes"] <= plan["needs_bytes"] / 2
    assert plan["peak_bytes"] <= plan["fast_bytes"]
    chip = mopt("plan", net, "-t", "cortex-m7", "--json").document
    assert (chip["fast"], chip["fast_bytes"]) == ("sram", 256 * 1024)


def test_options_that_mean_nothing_are_refused(mopt: Call, net: str, place: Path) -> None:
    (place / "b.csv").write_text("id,lower,upper,size\na,0,1,4\n")
    for call in (
        ("b.csv", "--fast-memory", "25%"), (net, "--capacity", "12"), (net, "--no-weights"),
        (net, "--fast-memory", "1MiB", "--header", "plan.h"),
    ):  # fmt: skip
        done = mopt("plan", *call)
        assert done.code == 2 and "error[option-without-meaning]" in done.err


def test_a_fast_memory_that_holds_no_step_is_refused(mopt: Call, net: str) -> None:
    done = mopt("plan", net, "--fast-memory", "100")
    assert done.code == 2
    assert "error[fast-memory-too-small]" in done.err
    assert mopt("plan", net, "--fast-memory", "much").code == 2
