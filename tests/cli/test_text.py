from __future__ import annotations

import pytest

from mopt.cli._text import (
    change,
    count,
    disk_size,
    memory_size,
    milliseconds,
    plural,
    safe,
    safe_lines,
    seconds,
    three_digits,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("größe", "größe"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b31m", "\\x9b31m"),
        ("half \ud800", "half \\ud800"),
        ("::add-mask::secret", "\\x3a:add-mask::secret"),
        ("  ::error::x", "  \\x3a:error::x"),
        ("x ##[group]", "x #\\x23[group]"),
    ],
)
def test_what_a_stranger_wrote_cannot_act_on_the_terminal(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_lines_stay_lines_and_each_is_escaped() -> None:
    assert safe_lines("one\n\x1btwo\n::three") == "one\n\\x1btwo\n\\x3a:three"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (4.1234, "4.12"), (41.26, "41.3"), (0.03117, "0.0312"), (9.999, "10.0"),
     (1234.5, "1,230"), (999.6, "1,000"), (-2.5, "-2.50")],
)  # fmt: skip
def test_three_significant_digits_and_no_powers_of_ten(value: float, shown: str) -> None:
    assert three_digits(value) == shown


def test_disk_counts_in_thousands_and_memory_in_1024s() -> None:
    assert disk_size(999) == "999 B"
    assert disk_size(2_940_000) == "2.94 MB"
    assert memory_size(1024) == "1.00 KiB"
    assert memory_size(9.4 * 2**20) == "9.40 MiB"
    assert milliseconds(4.1234) == "4.12 ms"


def test_durations_counts_and_plurals() -> None:
    assert seconds(2.14) == "2.1 s"
    assert seconds(130) == "2 min 10 s"
    assert count(960) == "960"
    assert count(4_200_000) == "4.20 M"
    assert plural(1, "layer") == "1 layer"
    assert plural(1200, "layer") == "1,200 layers"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (10, 2, "5.00x smaller"),
        (2, 10, "5.00x larger"),
        (100, 95, "5.0 % smaller"),
        (100, 100.4, "0.4 % larger"),
        (100, 100.01, "the same"),
        (0, 0, "the same"),
    ],
)
def test_changes_are_factors_and_small_ones_percentages(
    before: float, after: float, said: str
) -> None:
    assert change(before, after, "smaller", "larger") == said
