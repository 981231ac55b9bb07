"""The last screen of a compile, from reports made for it."""

from __future__ import annotations

import io
from typing import Any

from mopt.cli._output import Column, Output
from mopt.cli._summary import fold_reasons, remarks, result_rows


def report(**changes: Any) -> dict[str, Any]:
    side = {"size_bytes": 16_810_000, "peak_bytes": {"measured": 21 * 2**20, "estimated": None},
            "latency_ms": {"measured": 4.12, "estimated": None}}  # fmt: skip
    after = {"size_bytes": 2_940_000, "peak_bytes": {"measured": 10 * 2**20, "estimated": None},
             "latency_ms": {"measured": 2.05, "estimated": None}}  # fmt: skip
    data: dict[str, Any] = {
        "baseline": side,
        "result": after,
        "speed": {"ratio": 0.5, "ratio_low": 0.48, "ratio_high": 0.52, "confidence": 0.99,
                  "pairs": 20, "eager_ms": 6.15},
        "quality": {"metric": "bits per byte", "higher_is_better": False, "baseline": 2.113,
                    "result": 2.121, "batches": 3, "cosine": 0.99951, "sqnr_db": 38.21},
        "coverage": {"parameters": 1.0, "flops": 1.0, "outside": []},
        "layers": [],
        "steps": [],
    }  # fmt: skip
    return {**data, **changes}


def speed(**changes: Any) -> dict[str, Any]:
    return {**report()["speed"], **changes}


def test_every_number_has_a_unit_and_says_how_it_was_found() -> None:
    rows = result_rows(report())
    assert rows == [
        ["size", "16.8 MB", "2.94 MB", "5.72x smaller", "measured"],
        ["latency", "4.12 ms", "2.05 ms", "2.00x faster",
         "measured (99 % sure: 1.92x to 2.08x)"],
        ["  beside PyTorch eager", "6.15 ms", "2.05 ms", "3.00x faster", "measured"],
        ["peak memory", "21.0 MiB", "10.0 MiB", "2.10x lower", "measured"],
        ["bits per byte", "2.113", "2.121", "0.4 % worse", "measured"],
    ]  # fmt: skip
    assert all(row[-1].startswith(("measured", "estimated")) for row in rows)


def test_pytorch_beside_comes_with_its_spread() -> None:
    faster = speed(eager_samples_ms=[6.15, 6.0, 6.3])
    assert result_rows(report(speed=faster))[2][-1] == "measured (2.93x to 3.07x)"
    slower = speed(eager_ms=1.0, eager_samples_ms=[1.0, 1.025])
    row = result_rows(report(speed=slower))[2]
    assert row[-2:] == ["2.05x slower", "measured (2.00x to 2.05x)"]


def test_estimates_stand_beside_with_their_error() -> None:
    data = report()
    data["baseline"]["latency_ms"]["estimated"] = 4.40
    data["result"]["latency_ms"]["estimated"] = 2.20
    row = result_rows(data)[2]
    assert row == ["", "4.40 ms", "2.20 ms", "2.00x faster", "estimated (error +7 %)"]


def test_a_higher_metric_that_falls_is_worse() -> None:
    quality = {**report()["quality"], "higher_is_better": True, "baseline": 0.99, "result": 0.98}
    assert result_rows(report(quality=quality))[-1][3] == "1.0 % worse"


def test_drift_stands_in_where_there_is_no_metric() -> None:
    quality = {**report()["quality"], "metric": None}
    row = result_rows(report(quality=quality))[-1]
    assert row[0] == "output drift"
    assert "cosine 0.99951" in row[2]
    assert "38.2 dB" in row[3]
    exact = {**quality, "sqnr_db": None}
    assert result_rows(report(quality=exact))[-1][3] == "identical"


def test_an_interval_around_one_is_no_difference() -> None:
    data = report(speed=speed(ratio=0.99, ratio_low=0.95, ratio_high=1.02))
    row = result_rows(data)[1]
    assert row[3] == "no difference"
    assert row[4] == "measured (99 % sure: -5.0 % to +2.0 % time)"
    assert remarks(data) == []


def test_slower_is_said_plainly_with_what_to_do() -> None:
    data = report(speed=speed(ratio=2.0, ratio_low=1.9, ratio_high=2.1))
    assert result_rows(data)[1][3:] == ["2.00x slower", "measured (99 % sure: 1.90x to 2.10x)"]
    said = "\n".join(remarks(data))
    assert "Slower than uncompressed: 2.00x slower on this machine, measured" in said
    assert "another recipe" in said
    assert "--set PASS.skip" in said


def test_what_was_not_measured_is_said_and_not_shown() -> None:
    data = report(speed=None)
    for side in ("baseline", "result"):
        for key in ("latency_ms", "peak_bytes"):
            data[side][key] = {"measured": None, "estimated": None}
    assert [row[0] for row in result_rows(data)] == ["size", "bits per byte"]
    assert remarks(data)[0] == "Latency and memory were not measured (--no-measure)"


def test_reasons_that_differ_only_in_numbers_are_one() -> None:
    reasons = ["96 weights are fewer than min_size 4096", "no kernel",
               "768 weights are fewer than min_size 4096"]  # fmt: skip
    assert fold_reasons(reasons) == [
        ("96 weights are fewer than min_size 4096 (and similar)", 2),
        ("no kernel", 1),
    ]


def test_kept_layers_are_only_told_when_something_compressed() -> None:
    layers = [{"path": "a", "bytes_before": 8, "bytes_after": 8},
              {"path": "b", "bytes_before": 8, "bytes_after": 2}]  # fmt: skip
    skipped = [{"site": "a", "reason": "too small"}, {"site": "b", "reason": "by another pass"}]
    lossy = {"name": "q", "numerics": "lossy", "skipped": skipped}
    said = remarks(report(layers=layers, steps=[lossy]))
    assert said[:2] == ["Kept as they were: 1 of 2 layers", "  1 x too small"]
    exact = {**lossy, "numerics": "exact"}
    assert remarks(report(layers=layers, steps=[exact])) == []


def test_why_a_pass_left_the_whole_model_alone_is_told() -> None:
    layers = [{"path": name, "bytes_before": 8, "bytes_after": 8} for name in "ab"]
    skipped = [{"site": "", "reason": "no blocks"}, {"site": "a", "reason": "too small"}]
    step = {"name": "p", "numerics": "lossy", "changed": False, "skipped": skipped}
    said = remarks(report(layers=layers, steps=[step]))
    kept = ["Kept as they were: 2 of 2 layers", "  1 x too small", ""]
    assert said == ["p changed nothing: no blocks", *kept]
    said = remarks(report(layers=layers, steps=[{**step, "changed": True}]))
    assert said == [*kept[:2], "  1 x no pass of the recipe is for them", ""]


def test_layers_with_zeros_are_told_as_such_and_not_as_kept() -> None:
    layers = [{"path": name, "bytes_before": 8, "bytes_after": 8} for name in "ab"]
    sparse = {"name": "p", "numerics": "lossy", "skipped": [], "stats": {"zeros_of": {"a": 0.5}}}
    said = remarks(report(layers=layers, steps=[sparse]))
    assert said[0].startswith("1 layer with 50% zeros, stored as floats like the others")
    assert "Kept as they were: 1 of 2 layers" in said


def test_what_stayed_outside_is_told_with_its_place() -> None:
    part = {"path": "decoder", "reason": "a loop depends on a value", "source": "net.py:9"}
    coverage = {"parameters": 0.93, "flops": 0.5, "outside": [part] * 5}
    said = remarks(report(coverage=coverage))
    assert said[0].startswith("Captured 93% of parameters and 50% of FLOPs")
    assert said[1] == "  decoder: a loop depends on a value  at net.py:9"
    assert said[4] == "  and 2 more, in report.json"


def test_narrow_terminals_get_lines_of_key_and_value(monkeypatch: Any) -> None:
    class Narrow(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    screen = Narrow()
    out = Output(stdout=screen, stderr=io.StringIO())
    out.table([Column("pass"), Column("")], [["fold-constants", "Compute at build time"]])
    assert screen.getvalue() == "pass: fold-constants\nCompute at build time\n\n"


def test_weights_that_are_only_small_in_the_file_are_named() -> None:
    sizes = {"path": "up", "bytes_before": 8, "bytes_after": 1}
    layers = [{**sizes, "widened": True}, {**sizes, "widened": False}]
    told = remarks(report(layers=layers))
    assert told[0].startswith("1 layer is small in the file only: its weights become")
    assert remarks(report(layers=layers[1:])) == []


def test_what_binds_and_the_costliest_layers_are_told() -> None:
    layers = [
        {"path": f"blocks.{i}", "format": "int4-g32", "bytes_before": 8, "bytes_after": 1,
         "candidates": [{"format": "int4-g32", "loss": 0.001 * i}]}
        for i in range(5)
    ]  # fmt: skip
    told = remarks(report(layers=layers, choice={"binding": ["size"]}))
    assert "Binding: size  (prices: mopt inspect DIR --why budget)" in told
    assert (
        "Costliest: blocks.4 int4-g32 (0.4 %), blocks.3 int4-g32 (0.3 %), blocks.2 int4-g32 (0.2 %)"
    ) in told
    for layer in layers:
        layer["candidates"] = []
    step = {"numerics": "lossy", "skipped": [], "name": "quantize-weights",
            "stats": {"weight_error": {"blocks.1": 0.007, "blocks.2": "x"}}}  # fmt: skip
    assert "Rounded most: blocks.1 int4-g32 (0.7 %)" in remarks(report(layers=layers, steps=[step]))
