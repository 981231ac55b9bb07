"""What a recipe's passes say before anything runs."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command_line import Call


def test_a_format_without_kernel_is_said_to_save_bytes_only_before_the_model_is_read(
    mopt: Call,
) -> None:
    Path("broken.py").write_text("raise ValueError('no model here')")
    result = mopt("compile", "broken.py:factory", "-r", "nf4")
    assert result.code != 0
    assert "nf4 has no kernel on this target" in result.err
    assert "no kernel" not in mopt("compile", "broken.py:factory", "-r", "int8-dynamic").err
