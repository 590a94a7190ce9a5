"""What was taken from an OpenPCDet YAML, as a table."""

from __future__ import annotations

from typing import Any

import yaml
from rich.table import Table

from dsvt_ros.model.pcdet.reader import PcdetModel


def pcdet_table(found: PcdetModel) -> Table:
    """Our keys and values, and the keys of theirs behind them, with the file where it is not the model's own."""
    remarks = "".join(f"\nBeware: {remark}." for remark in found.remarks)
    table = Table(
        title=f"What {found.file} says",
        title_justify="left",
        caption=f"Keys without a file come from {found.file}.{remarks}",
        caption_justify="left",
    )
    table.add_column("our key", no_wrap=True)
    for heading in ("value", "their key, and its file"):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        files = [file for file in row.from_files if file != found.file]
        origin = f"{row.from_key}\n({', '.join(files)})" if files else row.from_key
        table.add_row(row.key, _lines(row.value), origin)
    return table


def _lines(value: Any) -> str:
    """A value as it would stand in ``model.yaml``; of a list of mappings, one a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join(map(_lines, value))
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("...\n").strip()
