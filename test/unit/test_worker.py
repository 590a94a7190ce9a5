"""One slot, one thread, one answer."""

import threading

import pytest

from dsvt_ros.ros.mailbox import Mailbox
from dsvt_ros.ros.worker import Worker


def test_newest_item_replaces_the_waiting_one():
    mailbox = Mailbox()
    assert not mailbox.put(1)
    assert mailbox.put(2)
    assert mailbox.take() == 2
    assert not mailbox.put(3)


def test_closed_mailbox_gives_nothing():
    mailbox = Mailbox()
    mailbox.put(1)
    mailbox.close()
    assert mailbox.take() is None


class Bench:
    """A worker whose answers can be held up."""

    def __init__(self):
        self.answers = []
        self.busy = threading.Event()
        self.go_on = threading.Event()
        self.worker = Worker(lambda: "detector", self.answer)

    def answer(self, detector, item):
        assert detector == "detector"
        self.busy.set()
        assert self.go_on.wait(5)
        self.answers.append(item)


def test_busy_worker_answers_the_newest_next():
    bench = Bench()
    assert bench.worker.loaded(5) == "detector"
    assert not bench.worker.put(1)
    assert bench.busy.wait(5)
    assert [bench.worker.put(item) for item in (2, 3, 4)] == [False, True, True]
    bench.go_on.set()
    while len(bench.answers) < 2:
        pass
    assert bench.answers == [1, 4]
    assert bench.worker.stop(5)


def test_drain_drops_the_waiting_item_and_finishes_the_current_one():
    bench = Bench()
    bench.worker.put(1)
    assert bench.busy.wait(5)
    bench.worker.put(2)
    assert bench.worker.drain(0.05)
    bench.go_on.set()
    assert not bench.worker.drain(5)
    assert bench.answers == [1]
    assert bench.worker.stop(5)


def test_stop_does_not_wait_for_ever():
    bench = Bench()
    bench.worker.put(1)
    assert bench.busy.wait(5)
    assert not bench.worker.stop(0.05)
    bench.go_on.set()


def test_error_while_loading_comes_out():
    def fail():
        raise ValueError("no such model")

    worker = Worker(fail, print)
    with pytest.raises(ValueError, match="no such model"):
        worker.loaded(5)
    assert worker.stop(5)
