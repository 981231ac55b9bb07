"""The moving line of a running stage, drawn by rich."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

BAR_AFTER = 1.0


class _LateBar(ProgressColumn):
    """A bar only while there is something to count, and once the stage has taken a second."""

    def __init__(self) -> None:
        self._bar = BarColumn(bar_width=20)
        super().__init__()

    def render(self, task: Task) -> object:  # type: ignore[override]
        if not task.fields["counts"] or (task.elapsed or 0.0) < BAR_AFTER:
            return Text("")
        return self._bar.render(task)


def make_bar(console: Console, stage_width: int) -> Progress:
    """One line: stage, what it is at, bar, time. It vanishes when stopped."""
    return Progress(
        TextColumn(f"{{task.fields[stage]:<{stage_width}}}", markup=False),
        TextColumn("{task.fields[detail]}", markup=False),
        _LateBar(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
