"""Our description of a model in the making, with a record of what each value was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsvt_ros.model.pcdet.section import Section


@dataclass(frozen=True)
class Row:
    """One value of our description, and the keys of theirs that it was made from, with their files."""

    key: str
    value: Any
    from_key: str
    from_files: tuple[str, ...]


class Translation:
    """The nested mappings of a ``model.yaml``.

    Attributes:
        tree: The mappings.
        rows: Where every value comes from.
        remarks: Where detections may differ from upstream's nevertheless.
    """

    def __init__(self, name: str) -> None:
        self.tree: dict[str, Any] = {"model": {"name": name}, "defaults": {}}
        self.rows: list[Row] = []
        self.remarks: list[str] = []

    def put(self, key: str, value: Any, section: Section, *names: str) -> None:
        """Set one of our values, made from values of theirs in `section`."""
        *groups, leaf = key.split(".")
        node = self.tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
        files = dict.fromkeys(filter(None, (section.file(name) for name in names)))
        given = [section.key(names[0]), *(name for name in names[1:] if section.file(name))]
        self.rows.append(Row(key, value, ", ".join(given), tuple(files)))

    def take(self, section: Section, keys: Mapping[str, str]) -> None:
        """Set values of ours that are theirs unchanged; `keys` maps theirs to ours."""
        for theirs, ours in keys.items():
            self.put(ours, section.need(theirs), section, theirs)
