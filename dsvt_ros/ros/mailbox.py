"""A slot for one item: the newest replaces what nobody took yet."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Hands the newest item to the one thread that takes; older ones are dropped, never queued."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._item: T | None = None
        self._busy = False
        self._closed = False

    def put(self, item: T) -> bool:
        """Leave an item; True if one that nobody took was dropped for it."""
        with self._changed:
            replaced = self._item is not None
            self._item = item
            self._changed.notify_all()
            return replaced

    def take(self) -> T | None:
        """Wait for an item; None once the mailbox is closed. Calling it again ends the last one."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._item is not None or self._closed)
            if self._closed:
                return None
            item, self._item = self._item, None
            self._busy = True
            return item

    def drain(self, timeout_s: float) -> bool:
        """Drop the waiting item and wait until the last one taken is done; True if one was dropped."""
        with self._changed:
            dropped, self._item = self._item is not None, None
            self._changed.wait_for(lambda: not self._busy, timeout_s)
            return dropped

    def close(self) -> None:
        """Drop the item and let every `take` return None from now on."""
        with self._changed:
            self._item, self._closed = None, True
            self._changed.notify_all()
