"""mopt plan-model: a plan for a device, as a table, JSON, a C header and metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tests.cli.command_line import Call


def test_a_model_is_planned(mopt: Call, net: str, place: Path) -> None:
    files = ("-o", "plan.json", "--header", "net_plan.h", "--tflm", "plan.bin")
    done = mopt("plan-model", net, *files)
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
    assert mopt("plan-model", net, "--json").document["peak_bytes"] == 5120
