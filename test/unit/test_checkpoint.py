import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsvt_ros.errors import ModelError
from dsvt_ros.model.checkpoint import load_weights, read_weights


class Exploit:
    def __reduce__(self):
        return os.system, ("touch /tmp/dsvt_ros_was_here",)


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_state": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_reads_what_torch_saves(tmp_path, network, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap(network.state_dict()), path)
    load_weights(network, read_weights(path), str(path))


def test_counters_may_be_missing(tmp_path, network):
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(network, read_weights(tmp_path / "w.safetensors"), "w")


def test_never_runs_code(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model_state": {"a": torch.zeros(1)}, "extra": Exploit()}, path)
    with pytest.raises(ModelError, match="more than weights"):
        read_weights(path)
    assert not Path("/tmp/dsvt_ros_was_here").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x00" * 4000])
def test_corrupt_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=name):
        read_weights(path)


def test_truncated_file(tmp_path, network):
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        path = tmp_path / name
        save(network.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ModelError, match=name):
            read_weights(path)


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match="no weights file"):
        read_weights(tmp_path / "nothing.pth")


def test_mismatches_are_listed(network):
    weights = dict(network.state_dict())
    weights["2.weight"] = weights.pop("0.bias")
    weights["0.weight"] = torch.zeros(4, 3)
    with pytest.raises(ModelError) as error:
        load_weights(network, weights, "w.pth")
    message = str(error.value)
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: 2.weight" in message
    assert "0.weight (4, 3) instead of (2, 3)" in message


def test_nan_weights_are_refused(network):
    weights = dict(network.state_dict())
    weights["0.bias"] = torch.full((2,), torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        load_weights(network, weights, "w.pth")
