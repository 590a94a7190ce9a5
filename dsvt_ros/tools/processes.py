"""Child processes that never outlive the command that started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from dsvt_ros.errors import DsvtError

END_S = 3.0
"""How long children may take to end after an interrupt."""


class ChildError(DsvtError):
    """A child process ended or kept silent where it should not."""


class Child:
    """A Python module as a process; what it prints goes to ``NAME.out`` and ``NAME.log``.

    Args:
        name: For messages and file names.
        command: Module and arguments.
        folder: Where the files go.
        environment: All environment variables.
    """

    def __init__(self, name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._output = folder / f"{name}.out"
        self._log = folder / f"{name}.log"
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=dict(environment),
            )

    @property
    def lines(self) -> list[str]:
        """Complete lines that the process has printed so far."""
        return self._output.read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def log(self) -> str:
        """What the process has written to stderr."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def last_words(self, number: int = 10) -> str:
        """The last lines of the log, for an error message."""
        return "\n".join(f"  {line}" for line in self.log.splitlines()[-number:]) or "  (it said nothing)"


class Children:
    """Starts processes and ends all of them with the block, also after Ctrl-C or SIGTERM.

    Args:
        folder: Where their output goes.
        environment: All environment variables.
        timeout_s: For everything together.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], timeout_s: float) -> None:
        self._folder = folder
        self._environment = environment
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def start(self, name: str, *command: str) -> Child:
        """Start ``python -m MODULE ARGUMENTS``."""
        child = Child(name, list(command), self._folder, self._environment)
        self._children.append(child)
        return child

    def wait(self, child: Child, what: str, text: str | None = None) -> None:
        """Wait until a child has logged or printed a text or, without one, has ended well.

        Raises:
            ChildError: Any child ended early or failed, or time is up; with its last words.
        """
        while True:
            done = child.process.poll()
            if text is not None and (text in child.log or any(text in line for line in child.lines)):
                return
            if text is None and done == 0:
                return
            for other in self._children:
                code = other.process.poll()
                if code is not None and (code != 0 or other is child):
                    raise ChildError(
                        f"the {other.name} ended with exit code {code} before {what}; it said last:\n"
                        f"{other.last_words()}"
                    )
            if time.monotonic() > self._deadline:
                raise ChildError(
                    f"{what} took longer than the {self._timeout_s:g} s that all may take; "
                    f"the {child.name} said last:\n{child.last_words()}"
                )
            time.sleep(0.05)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + END_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                child.process.kill()
                child.process.wait()
