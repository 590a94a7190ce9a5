"""How long work goes on, on standard error: a moving line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from dsvt_ros.backends import Progress

PLAIN_PERIOD_S = 15.0
"""Between two lines of a log."""


@contextmanager
def terminal_progress(console: Console | None = None) -> Iterator[Progress]:
    """A `Progress` to hand to what may take long; nothing is shown until it is called.

    Args:
        console: Where to show it; None for standard error, so that output in a pipe or file stays as it is.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    display = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
        _ShareColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=not console.stderr,  # else what is printed meanwhile would end up on standard error
    )

    def show(text: str, fraction: float | None) -> None:
        if not display.tasks:
            display.add_task(text, total=1.0, share=fraction)
            display.start()
        display.update(display.tasks[0].id, description=text, share=fraction)

    try:
        yield show
    finally:
        display.stop()


class _ShareColumn(rich.progress.ProgressColumn):
    """A bar while the share that is done is known."""

    def render(self, task: rich.progress.Task) -> RenderableType:
        """The bar, or nothing."""
        share = task.fields["share"]
        return Text() if share is None else ProgressBar(total=1.0, completed=share, width=30)


def _plain(console: Console) -> Progress:
    last: float | None = None

    def show(text: str, fraction: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last >= PLAIN_PERIOD_S:
            last = now
            line = text if fraction is None else f"{text}, {fraction:.0%}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    return show
