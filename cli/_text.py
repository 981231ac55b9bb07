"""Text on its way to a terminal: what a stranger wrote is made harmless, numbers get their units.

Sizes on disk are in powers of 1000 (kB, MB), memory in powers of 1024 (KiB, MiB), times in ms, all
with three significant digits.
"""

from __future__ import annotations

from math import floor, log10


def safe(text: object) -> str:
    r"""One line of text with everything unprintable shown as an escape such as ``\x1b``.

    Control characters, line ends, bidirectional marks and half surrogates cannot act on a terminal,
    and a name such as ``::add-mask::`` is no command to a CI system that reads the log.
    """
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )
    if escaped.lstrip().startswith("::"):
        escaped = escaped.replace(":", "\\x3a", 1)
    return escaped.replace("##[", "#\\x23[")


def safe_lines(text: object) -> str:
    """Several lines, each made harmless by itself."""
    return "\n".join(safe(line) for line in str(text).split("\n"))


def three_digits(value: float) -> str:
    """A number with three significant digits, never in powers of ten: ``4.12``, ``0.0312``."""
    if value == 0:
        return "0"
    digits = 2 - floor(log10(abs(value)))
    rounded = round(value, digits)
    # Rounding may carry into another digit: 9.999 is 10.0, not 10.00.
    digits = 2 - floor(log10(abs(rounded)))
    return f"{rounded:,.{max(digits, 0)}f}"


def disk_size(count: float) -> str:
    """Bytes on disk, in powers of 1000."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(count: float) -> str:
    """Bytes in memory, in powers of 1024."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def milliseconds(value: float) -> str:
    """A time in ms."""
    return f"{three_digits(value)} ms"


def seconds(value: float) -> str:
    """How long something took: ``2.1 s``, ``2 min 10 s``."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def count(value: float) -> str:
    """A large count: ``4.20 M``; small ones in full."""
    if value < 1000:
        return f"{value:.0f}"
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def change(before: float, after: float, less: str, more: str) -> str:
    """How ``after`` compares: ``5.72x smaller`` with ``less`` = "smaller", or a percentage.

    Changes below 1.2x read better as percentages.
    """
    if before <= 0 or after <= 0:
        return "the same" if before == after else ""
    factor, word = (before / after, less) if after < before else (after / before, more)
    if factor >= 1.2:
        return f"{three_digits(factor)}x {word}"
    percent = 100 * abs(after / before - 1)
    return "the same" if percent < 0.05 else f"{percent:.1f} % {word}"


def plural(number: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value /= base
        power += 1
    number = f"{value:.0f}" if power == 0 else three_digits(value)
    return f"{number} {units[power]}".strip()
