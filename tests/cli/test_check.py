"""mopt check: what fails the gate, what does not, and what it says. Compiling is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from mopt.errors import CaptureError, InputError, UsageError
from mopt.gate import Verdict, compare, entry_of
from mopt.gate_config import read_config
from tests.cli import report_fixture as made
from tests.cli.command_line import Call

CONFIG = """
[models.net]
model = "net.py:factory"
"""
Give = Callable[..., None]


@pytest.fixture
def gives(place: Path, monkeypatch: pytest.MonkeyPatch) -> Give:
    """Make every compile of ``mopt check`` give a report, or raise."""
    (place / "mopt.toml").write_text(CONFIG)

    def give(data: dict[str, Any] | Exception) -> None:
        def compile(*_: Any) -> Any:
            if isinstance(data, Exception):
                raise data
            return SimpleNamespace(report=SimpleNamespace(data=data))

        monkeypatch.setattr("mopt.cli.check._compile", compile)

    return give


def entry(**changes: Any) -> dict[str, Any]:
    return {**entry_of(made.report()), **changes}


def verdicts(base: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Verdict]:
    return {row.metric: row.verdict for row in compare("net", base, now)}


def with_rows(**rows: float) -> dict[str, Any]:
    known = entry()
    return {**known, "rows": {**known["rows"], **{k.replace("_", "-"): v for k, v in rows.items()}}}


# ---- what is compared


def test_the_same_numbers_pass() -> None:
    assert set(verdicts(entry(), entry()).values()) == {Verdict.OK}


@pytest.mark.parametrize(("metric", "worse", "verdict"), [
    ("size", 2_940_000 * 1.02, Verdict.FAIL),
    ("size", 2_940_000 * 1.005, Verdict.OK),
    ("size", 1_000_000, Verdict.OK),
    ("latency-estimated", 4.2, Verdict.FAIL),
    ("peak-memory", 0.25, Verdict.FAIL),
    ("quality", 0.97, Verdict.FAIL),
    ("quality", 0.99, Verdict.OK),
    ("coverage", 0.7, Verdict.WARN),
])  # fmt: skip
def test_each_metric_has_its_limit(metric: str, worse: float, verdict: Verdict) -> None:
    assert verdicts(entry(), with_rows(**{metric: worse}))[metric] is verdict


@pytest.mark.parametrize(("ratio", "interval", "verdict"), [
    (0.7, [0.65, 0.75], Verdict.FAIL),
    (0.53, [0.52, 0.54], Verdict.OK),
    (0.56, [0.45, 0.8], Verdict.NOISY),
    (0.3, [0.2, 0.4], Verdict.OK),
])  # fmt: skip
def test_times_are_judged_by_their_interval(
    ratio: float, interval: list[float], verdict: Verdict
) -> None:
    now = {**with_rows(latency_measured=ratio), "interval": interval}
    assert verdicts(entry(), now)["latency-measured"] is verdict


def test_times_of_another_machine_are_not_compared() -> None:
    base = entry(machine={"cpu": "another", "cores": 64})
    found = verdicts(base, {**with_rows(latency_measured=0.9), "interval": [0.88, 0.92]})
    assert found["latency-measured"] is found["latency-estimated"] is Verdict.SKIPPED
    assert found["size"] is Verdict.OK
    slower = {**with_rows(latency_measured=1.2), "interval": [1.15, 1.25]}
    assert verdicts(base, slower)["latency-measured"] is Verdict.FAIL


def test_lower_is_better_for_some_metrics() -> None:
    now = {**with_rows(quality=1.5), "higher_is_better": False}
    assert verdicts(with_rows(quality=1.0), now)["quality"] is Verdict.FAIL


# ---- the command


def test_a_gate_from_first_run_to_regression(mopt: Call, place: Path, gives: Give) -> None:
    gives(made.report())
    done = mopt("check")
    assert done.code == 0 and "new" in done.out
    assert mopt("check", "--update-baseline").code == 0
    written = (place / "mopt-baseline.json").read_bytes()
    assert mopt("check", "--update-baseline").code == 0
    assert (place / "mopt-baseline.json").read_bytes() == written
    done = mopt("check")
    assert (done.code, done.out) == (0, done.out) and "passed" in done.out
    layers = [made.layer("a.first", format="float32"), made.layer("b.second", 1)]
    gives(made.report(layers, result=made.side(4_000_000, 2.05)))
    done = mopt("check")
    assert done.code == 1 and "error[gate-failed]" in done.err
    assert "FAIL" in done.out and "36 % worse" in done.out
    assert "a.first: int4-g32 -> float32" in done.out
    assert mopt("check", "--exit-zero").code == 0
    data = mopt("check", "--json").document
    assert data["passed"] is False and data["failed_rows"] == 2


def test_machine_readable_forms(
    mopt: Call, place: Path, gives: Give, monkeypatch: pytest.MonkeyPatch
) -> None:
    gives(made.report())
    assert mopt("check", "--update-baseline").code == 0
    outside = [{"path": "::stop|", "reason": "a\nb%", "source": "net,py:7"}]
    coverage = {"parameters": 0.5, "flops": 0.5, "outside": outside}
    gives(made.report(result=made.side(4_000_000, 2.05), coverage=coverage))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "step.md"))
    done = mopt("check", "--junit", "out.xml", "--markdown", "out.md")
    assert done.code == 1
    (suite,) = ElementTree.parse(place / "out.xml").getroot()
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["size", "peak-memory"] and suite.get("failures") == "2"
    assert (place / "step.md").read_text() == (place / "out.md").read_text()
    assert "| net | size | 2.94 MB | 4.00 MB |" in (place / "out.md").read_text()
    commands = [line for line in done.err.splitlines() if line.startswith("::")]
    assert commands[0].startswith("::error title=mopt check::net: size is 36 %25 worse")
    assert "::warning title=mopt check,file=net%2Cpy,line=7::" in commands[-1]
    assert commands[-1].endswith(r"a\nb%25")


def test_a_model_that_breaks_fails_and_keeps_the_baseline(
    mopt: Call, place: Path, gives: Give
) -> None:
    gives(made.report())
    assert mopt("check", "--update-baseline").code == 0
    gives(CaptureError("no graph", code="no-capture"))
    done = mopt("check", "--junit", "out.xml")
    assert done.code == 1 and "error[no-capture]: no graph" in done.out
    assert 'errors="1"' in (place / "out.xml").read_text()
    before = (place / "mopt-baseline.json").read_bytes()
    assert "error[gate-model-failed]" in mopt("check", "--update-baseline").err
    assert (place / "mopt-baseline.json").read_bytes() == before


def test_a_model_that_is_gone_fails(mopt: Call, place: Path, gives: Give) -> None:
    gives(made.report())
    assert mopt("check", "--update-baseline").code == 0
    (place / "mopt.toml").write_text(CONFIG.replace("models.net", "models.other"))
    done = mopt("check")
    assert done.code == 1 and "in the baseline but not in mopt.toml" in done.out


@pytest.mark.parametrize("data", [
    [], {}, {"schema": 2}, {"schema": 1, "models": 3}, {"schema": 1, "models": {"net": 4}},
    {"schema": 1, "models": {"net": {**entry(), "rows": {"size": "x"}}}},
    {"schema": 1, "models": {"net": {**entry(), "interval": [1]}}},
    {"schema": 1, "models": {"net": {**entry(), "machine": None}}},
])  # fmt: skip
def test_a_baseline_may_be_anybodys(mopt: Call, place: Path, gives: Give, data: Any) -> None:
    gives(made.report())
    (place / "mopt-baseline.json").write_text(json.dumps(data))
    done = mopt("check")
    assert (done.code == 2 and "baseline]" in done.err) or "baseline-schema" in done.err


# ---- mopt.toml


def test_limits_are_read(place: Path) -> None:
    (place / "mopt.toml").write_text(
        CONFIG + '[check.limits]\nsize = {increase = "3 %"}\n'
        '[check.limits.net]\ncoverage = {level = "error", decrease = "2 pt"}\n'
    )
    (model,) = read_config("mopt.toml").models
    assert model.limits["size"].change == 0.03
    assert (model.limits["coverage"].level, model.limits["coverage"].absolute) == ("error", True)


@pytest.mark.parametrize(("text", "said"), [
    ("", "names no models"),
    ("[models.a]\nmodle = 'x'", "did you mean 'model'"),
    ("[models.a]\nrecipe = 'x'", "has no model"),
    ("[models.a]\nmodel = 3", "model is a text"),
    ("[models.a]\nmodel = 'x'\n[check.limits]\nsize = {increase = 'much'}", "such as '1 %'"),
    ("[models.a]\nmodel = 'x'\n[check.limits]\nsise = {}", "did you mean 'size'"),
    ("[models.a]\nmodel = 'x'\n[check]\nfail-on = 'always'", "error, warn or never"),
])  # fmt: skip
def test_mistakes_in_the_file_are_named(place: Path, text: str, said: str) -> None:
    (place / "mopt.toml").write_text(text)
    with pytest.raises((InputError, UsageError)) as caught:
        read_config("mopt.toml")
    assert said in str(caught.value)


def test_errors_of_check(mopt: Call, place: Path, gives: Give) -> None:
    assert "error[unknown-gate-model]" in mopt("check", "nett").err
    assert "error[no-baseline]" in mopt("check", "--baseline", "none.json").err
    (place / "mopt.toml").unlink()
    assert "error[no-gate-config]" in mopt("check").err
