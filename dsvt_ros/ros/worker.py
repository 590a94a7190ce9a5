"""The one thread that owns the detector, its device stream and its contexts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dsvt_ros.ros.mailbox import Mailbox

DetectorT = TypeVar("DetectorT")
ItemT = TypeVar("ItemT")


class Worker(Generic[DetectorT, ItemT]):
    """Loads a detector in a thread of its own, then answers the newest item, one at a time.

    Args:
        load: Makes the detector; what it raises comes out of `loaded`.
        answer: Called in the worker's thread for every item taken; must not raise.
    """

    def __init__(self, load: Callable[[], DetectorT], answer: Callable[[DetectorT, ItemT], None]) -> None:
        self._load = load
        self._answer = answer
        self._mailbox: Mailbox[ItemT] = Mailbox()
        self._ready = threading.Event()
        self._detector: DetectorT | None = None
        self._error: Exception | None = None
        # A daemon, so that a network that is still computing cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)
        self._thread.start()

    def loaded(self, timeout_s: float) -> DetectorT | None:
        """The detector, None if it is not ready in time.

        Raises:
            Exception: Whatever `load` raised.
        """
        if not self._ready.wait(timeout_s):
            return None
        if self._error is not None:
            raise self._error
        return self._detector

    def put(self, item: ItemT) -> bool:
        """Offer an item; True if an older one was dropped for it."""
        return self._mailbox.put(item)

    def drain(self, timeout_s: float) -> bool:
        """Drop the waiting item and let the current one be answered; True if one was dropped."""
        return self._mailbox.drain(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the current item; False if it is still busy after that time."""
        self._mailbox.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            detector = self._load()
        except Exception as error:  # handed over to the thread that waits in `loaded`
            self._error = error
            return
        else:
            self._detector = detector
        finally:
            self._ready.set()
        while (item := self._mailbox.take()) is not None:
            self._answer(detector, item)
