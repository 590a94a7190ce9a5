"""The nuScenes development kit, which computes the official figures, in a Python environment of its own.

It wants an old NumPy, so it cannot share ours: it is run as a program, and files go between.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvt_ros.backends import Progress, no_progress
from dsvt_ros.errors import DataError
from dsvt_ros.tools.processes import ChildError

REQUIREMENT = "nuscenes-devkit>=1.2,<1.3"
ENVIRONMENT = f"nuscenes-devkit-1.2-python{sys.version_info.major}.{sys.version_info.minor}"
"""Folder of the environment in the cache."""

_LIST_SPLITS = """
import json
from nuscenes.utils.splits import create_splits_scenes
print(json.dumps(create_splits_scenes()))
"""
_SUMMARY = "metrics_summary.json"
_NUM_LAST_WORDS = 5


@dataclass(frozen=True)
class Devkit:
    """A Python that has the kit.

    Attributes:
        python: The interpreter.
        isolated: Whether to keep PYTHONPATH and the user's packages away from it.
    """

    python: Path
    isolated: bool

    def scenes(self, split: str) -> tuple[str, ...]:
        """Names of the scenes of a split.

        Raises:
            DataError: There is no such split.
            ChildError: The kit cannot be run.
        """
        splits = json.loads(self._run(["-c", _LIST_SPLITS], "list the splits"))
        if split not in splits:
            raise DataError(f"nuScenes has no split {split}; expected one of {', '.join(splits)}")
        return tuple(splits[split])

    def evaluate(self, folder: Path, version: str, split: str, results: Path) -> dict[str, Any]:
        """The kit's summary of a results file: ``mean_ap``, ``nd_score``, ``tp_errors``, ``label_aps`` and more.

        Raises:
            ChildError: The kit fails, say because the file lacks a sample of the split; with its last words.
        """
        with tempfile.TemporaryDirectory(prefix="dsvt_nuscenes_") as output:
            arguments = ["-m", "nuscenes.eval.detection.evaluate", str(results.resolve())]
            arguments += ["--output_dir", output, "--dataroot", str(folder.resolve())]
            arguments += ["--version", version, "--eval_set", split]
            self._run([*arguments, "--plot_examples", "0", "--render_curves", "0", "--verbose", "0"], "score")
            summary: dict[str, Any] = json.loads((Path(output) / _SUMMARY).read_text())
            return summary

    def _run(self, arguments: Sequence[str], task: str) -> str:
        flags = ["-I"] if self.isolated else []
        # Its plotting library must not look for a display.
        environment = os.environ | {"MPLBACKEND": "Agg"}
        return _output_of([str(self.python), *flags, *arguments], f"nuscenes-devkit could not {task}", environment)


def open_devkit(python: Path | None, cache: Path, progress: Progress = no_progress) -> Devkit:
    """The kit of a given Python, or of an environment in the cache, which is made if it is not there.

    Args:
        python: An interpreter; None for the environment.
        cache: Folder for derived files.
        progress: Told about the installation, which takes a minute.

    Raises:
        ChildError: The environment cannot be made; with the last words of what failed.
    """
    if python is not None:
        return Devkit(python, isolated=False)
    home = cache / ENVIRONMENT
    if not _python_of(home).exists():
        progress(f"installing {REQUIREMENT} into {home}", None)
        _make_environment(home)
    return Devkit(_python_of(home), isolated=True)


def _make_environment(home: Path) -> None:
    """Make the environment under another name first, so that nobody finds half of it."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    except OSError as error:
        raise DataError(f"{home.parent} cannot be written: {error.strerror or error}") from error
    failure = "no environment for nuscenes-devkit (give one that has it with --devkit-python)"
    try:
        _output_of([sys.executable, "-m", "venv", str(partial)], failure)
        _output_of([str(_python_of(partial)), "-I", "-m", "pip", "install", "--quiet", REQUIREMENT], failure)
        partial.chmod(0o755)
        try:
            partial.rename(home)  # only scripts know the old name, and only the interpreter is used
        except OSError:
            if not _python_of(home).exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _output_of(command: list[str], failure: str, environment: dict[str, str] | None = None) -> str:
    """What a program prints; `ChildError` with its last words if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", env=environment
        )
    except OSError as error:
        raise ChildError(f"{failure}: {command[0]} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "(it said nothing)").splitlines()
        last = "\n".join(f"  {line}" for line in lines[-_NUM_LAST_WORDS:])
        raise ChildError(f"{failure}: exit code {done.returncode}; it said last:\n{last}")
    return done.stdout


def _python_of(home: Path) -> Path:
    return home / "bin" / "python"
