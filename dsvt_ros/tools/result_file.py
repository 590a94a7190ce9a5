"""The JSON that commands write with ``--output``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dsvt_ros.errors import DataError


def write_result(path: Path, content: dict[str, Any], console: Console) -> None:
    """Write a result, and say so.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    console.print(f"wrote {path}")
