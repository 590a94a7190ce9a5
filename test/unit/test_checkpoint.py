import collections
import os
import zipfile
from pathlib import Path

import numpy as np
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


def training_checkpoint(network):
    """What pcdet's training writes: an optimizer's state whose numbers came from NumPy."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(np.float64(0.95), 0.99))
    network(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = np.float64(3e-4)
    state["param_groups"][0]["momentum"] = np.float32(0.9)
    state["steps"] = collections.OrderedDict(total=np.int64(7), kind=np.dtype("float32"), history=np.arange(3.0))
    return {
        "epoch": 12,
        "it": np.int64(400),
        "model_state": network.state_dict(),
        "optimizer_state": state,
        "version": "pcdet+0.6.0+8cacccec",
    }


def rename_in_pickle(path, old, new, zipped):
    """The same file as another NumPy release writes it."""
    if not zipped:
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_reads_training_checkpoints(tmp_path, network, zipped, module):
    path = tmp_path / "checkpoint_epoch_12.pth"
    torch.save(training_checkpoint(network), path, _use_new_zipfile_serialization=zipped)
    written = np.float64(0).__reduce__()[0].__module__.encode()
    rename_in_pickle(path, b"c" + written + b"\n", b"c" + module + b"\n", zipped)
    weights = read_weights(path)
    assert set(weights) == set(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(weights[name], value)


def test_says_when_torch_cannot_skip_numpy_values(tmp_path, network, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    torch.save(training_checkpoint(network), path)
    monkeypatch.delattr(torch.serialization, "safe_globals")
    monkeypatch.delattr(torch.serialization, "add_safe_globals")
    with pytest.raises(ModelError, match=r"PyTorch 2.4 or later, or save its model_state alone"):
        read_weights(path)


def test_numpy_values_are_no_weights(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model_state": {"a": np.zeros(3)}}, path)
    with pytest.raises(ModelError, match="holds no state dict"):
        read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["model_state", "optimizer_state"])
def test_never_runs_code(tmp_path, network, zipped, key):
    path = tmp_path / "evil.pth"
    content = training_checkpoint(network)
    content[key]["extra"] = Exploit()
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"holds posix.system, which is more than weights"):
        read_weights(path)
    assert not Path("/tmp/dsvt_ros_was_here").exists()


def test_allowed_values_cannot_smuggle_code(tmp_path):
    """NumPy's own scalar() would make a value of any dtype; what takes its place makes none."""

    class Smuggler:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (np.dtype("O"), Exploit())

    path = tmp_path / "evil.pth"
    torch.save({"model_state": {"a": torch.zeros(1)}, "extra": Smuggler()}, path)
    with pytest.raises(ModelError, match=r"holds posix.system"):
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


class Pillars(nn.Module):
    """The parts of a network whose shapes tell what it was trained for."""

    def __init__(self, features, classes):
        super().__init__()
        self.vfe = nn.Module()
        self.vfe.pfn_layers = nn.ModuleList([nn.Module()])
        self.vfe.pfn_layers[0].linear = nn.Linear(features + 6, 96, bias=False)
        self.dense_head = nn.Module()
        self.dense_head.class_encoding = nn.Conv1d(classes, 4, 1)


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (Pillars(4, 3), "these weights were trained with 4 point features, the model has 5"),
        (Pillars(5, 10), "these weights were trained with 10 classes, the model has 3"),
    ],
)
def test_shapes_tell_what_weights_are_for(other, hint):
    with pytest.raises(ModelError) as error:
        load_weights(Pillars(5, 3), other.state_dict(), "w.pth")
    assert f"does not fit this model ({hint}): 1 misshapen" in str(error.value)


def test_nan_weights_are_refused(network):
    weights = dict(network.state_dict())
    weights["0.bias"] = torch.full((2,), torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        load_weights(network, weights, "w.pth")
