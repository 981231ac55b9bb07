"""--max-memory bounds what calibration holds."""

from __future__ import annotations

from tests.cli.command_line import Call


def test_more_activations_than_allowed_end_the_compile(mopt: Call, net: str) -> None:
    result = mopt("compile", net, "-r", "int4-gptq", "--trust", "--no-measure",
                  "--max-memory", "1kB", "-o", "out")  # fmt: skip
    assert result.code != 0
    assert "more than the limit of 0.0 MB" in result.err
    assert "--max-memory" in result.err


def test_a_size_is_asked_for(mopt: Call) -> None:
    for given in ("1x", "1", "0MB", "much", ""):
        result = mopt("compile", "zoo:digits-cnn", "--max-memory", given)
        assert result.code == 2
        assert "memory" in result.err
