"""Report: what was decided and measured, as data. Drawing lives elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The content of ``report.json``; the schema is ``docs/report-schema.json``."""

    data: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker, each labelled: ``{"latency_ms/measured": 2.05}``."""
        found: dict[str, float] = {}
        for side, prefix in (("result", ""), ("baseline", "baseline/")):
            part = self.data[side]
            found[f"{prefix}size_bytes/measured"] = part["size_bytes"]
            for name in ("latency_ms", "peak_bytes"):
                for label, value in part[name].items():
                    if isinstance(value, int | float):
                        found[f"{prefix}{name}/{label}"] = value
        quality = self.data["quality"]
        for key in ("baseline", "result", "cosine", "sqnr_db", "max_abs"):
            if isinstance(quality.get(key), int | float):
                found[f"quality/{key}"] = quality[key]
        found["coverage/parameters"] = self.data["coverage"]["parameters"]
        found["coverage/flops"] = self.data["coverage"]["flops"]
        return found

    def to_json(self) -> str:
        """Stable text: sorted keys, two spaces."""
        return json.dumps(self.data, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def _repr_html_(self) -> str:
        from html import escape

        before, after = self.data["baseline"], self.data["result"]
        rows = [
            ("size", f"{before['size_bytes'] / 1e6:.3g} MB", f"{after['size_bytes'] / 1e6:.3g} MB")
        ]
        old, new = before["latency_ms"]["measured"], after["latency_ms"]["measured"]
        if old and new:
            rows.append(("latency, measured", f"{old:.3g} ms", f"{new:.3g} ms"))
        body = "".join(
            f"<tr><td>{escape(a)}</td><td>{escape(b)}</td><td>{escape(c)}</td></tr>"
            for a, b, c in rows
        )
        head = "<tr><th></th><th>before</th><th>after</th></tr>"
        return f"<table><caption>{escape(str(self.data['model']))}</caption>{head}{body}</table>"
