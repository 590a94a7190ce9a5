"""``dsvt benchmark --ros``: clouds with the present time go through the node, and its own latency comes back."""

import json

import numpy as np
import pytest
from harness import random_points

from dsvt_ros.tools import cli

pytestmark = pytest.mark.ros


@pytest.mark.parametrize("order", ["<", ">"])
def test_only_the_stamp_changes(ros, order):
    from dsvt_ros.ros.player import stamp_from_cdr, with_stamp

    head = b"\x00\x01\x00\x00" if order == "<" else b"\x00\x00\x00\x00"
    cdr = head + bytes(8) + b"the rest"
    stamp_ns = 1_700_000_000_123_456_789
    changed = with_stamp(cdr, stamp_ns)
    assert stamp_from_cdr(changed) == stamp_ns
    assert (changed[:4], changed[12:]) == (head, b"the rest")


def test_latencies(ros, small_model, tmp_path, capsys):
    np.save(tmp_path / "cloud.npy", random_points(3000))
    command = ["benchmark", "--model", small_model, "--cloud", tmp_path / "cloud.npy", "--device", "cpu"]
    command += ["--runs", "2", "--ros", "6", "--rate", "5", "--output", tmp_path / "result.json"]
    assert cli.main([str(word) for word in command]) == 0
    assert "node, stamp to publish p50" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    heard = result["ros"]
    assert heard["num_sent"] == 6
    assert 1 <= heard["num_answered"] <= 6
    # Without stamps of its own time the latency would be decades.
    assert 0 < heard["stamp_to_publish_ms"]["p50"] < 10_000
    assert 0 < heard["sent_to_received_ms"]["p50"] < 10_000
