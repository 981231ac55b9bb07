"""fold-constants."""

from __future__ import annotations

from tests import tiny
from tests.case import Case

CASES = [
    Case("two-weights-added", tiny.add_two_weights, changed=True),
    Case("depends-on-input", tiny.add_weight_to_input, changed=False),
    Case(
        "too-large",
        lambda: tiny.outer(2048),
        options={"max_bytes": 8},
        changed=False,
        skipped="max_bytes",
    ),
]
