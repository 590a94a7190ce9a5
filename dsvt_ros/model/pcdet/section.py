"""A mapping inside OpenPCDet's YAML, all of whose keys must be accounted for."""

from __future__ import annotations

from typing import Any

from dsvt_ros.errors import ConfigError
from dsvt_ros.model.pcdet.files import PcdetYaml


class Section:
    """A mapping that keeps account of its keys: `close` refuses those that nobody asked for."""

    def __init__(self, source: PcdetYaml, path: str = "") -> None:
        """The mapping at a dotted path; empty for the whole YAML."""
        self._source, self._path = source, path
        values: Any = source.values
        for part in path.split(".") if path else ():
            values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"{source.path}: {path} must be a mapping, got {values!r}")
        self._values = values
        self._known: set[str] = set()

    def key(self, name: str) -> str:
        """The dotted key of one of its values."""
        return f"{self._path}.{name}" if self._path else name

    def file(self, name: str) -> str:
        """The file that a value came from; empty if there is none."""
        return self._source.files.get(self.key(name), "")

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or `default`."""
        self._known.add(name)
        return self._values.get(name, default)

    def need(self, name: str) -> Any:
        """A value; `ConfigError` if it is missing."""
        if name not in self._values:
            raise self.error(name, "is missing")
        return self.get(name)

    def section(self, name: str) -> Section:
        """A mapping inside; `ConfigError` if it is missing."""
        self.need(name)
        return Section(self._source, self.key(name))

    def word(self, name: str) -> str:
        """A word."""
        value = self.need(name)
        if not isinstance(value, str):
            raise self.error(name, f"must be a word, got {value!r}")
        return value

    def names(self, name: str) -> list[str]:
        """A list of words."""
        return self._list(name, str, "words")

    def numbers(self, name: str, count: int | None = None) -> list[Any]:
        """A list of numbers, of a certain length if one is given; not an empty one."""
        values = self._list(name, (int, float), "numbers")
        if count not in (None, len(values)):
            raise self.error(name, f"is {values} and must have {count} entries")
        return values

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {value!r}")
        return value

    def only(self, name: str, *supported: Any, default: Any = None, why: str = "") -> Any:
        """A value that must be one of `supported`, where `default` is what upstream takes a missing one for."""
        value = self.need(name) if default is None else self.get(name, default)
        if value not in supported:
            given = "" if name in self._values else ", upstream's default,"
            wanted = " or ".join(map(str, supported))
            raise self.error(name, f"is {value}{given} and must be {wanted}{why and f' ({why})'}")
        return value

    def skip(self, *names: str) -> None:
        """Values that do not matter at inference."""
        self._known.update(names)

    def close(self) -> None:
        """Refuse what was not asked for, since it may change the network; losses are training's."""
        for name in self._values:
            if name not in self._known and "LOSS" not in name.upper():
                raise self.error(name, "is not known here; remove it if it changes nothing at inference")

    def error(self, name: str, problem: str) -> ConfigError:
        """A problem with one of its values, with the value's key and file."""
        file = self.file(name)
        elsewhere = f" (from {file})" if file not in ("", self._source.path.name) else ""
        return ConfigError(f"{self._source.path}: {self.key(name)}{elsewhere} {problem}")

    def _list(self, name: str, kind: type | tuple[type, ...], what: str) -> list[Any]:
        values = self.need(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, kind) for value in values):
            raise self.error(name, f"must be a list of {what}, got {values!r}")
        return list(values)
