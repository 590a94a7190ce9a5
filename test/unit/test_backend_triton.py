"""The backend triton against torch: on a GPU where there is one, through Triton's interpreter on the CPU otherwise."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.machine import assert_alike
from tiny import TINY_CONFIGS, randomize, tiny_config, tiny_network, tiny_points, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.triton import TritonNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.capacity import capacity_for, write_padded
from dsvt_ros.comparison import common_proposals
from dsvt_ros.config import EncoderConfig, StageConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import named_maps, partition_from_tensors, sparse_specs, tensors_for
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools.cli import main as dsvt
from dsvt_ros.voxelization import voxelize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = "dsvt_ros.kernels.set_attention"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    """Kernels become interpreted ones when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            patch.delitem(sys.modules, KERNELS, raising=False)
        yield
    sys.modules.pop(KERNELS, None)


def network_of(channels, heads, set_size, ffn_channels, window=6):
    """One block over 32 by 32 pillars."""
    small = tiny_config()
    stage = StageConfig(1, set_size, windows=((window, window, 1), (10, 10, 1)), offsets=((0, 0, 0), (3, 3, 0)))
    backbone = dataclasses.replace(
        small.backbone_3d, channels=channels, num_heads=heads, ffn_channels=ffn_channels, stages=(stage,)
    )
    config = dataclasses.replace(small, encoder=EncoderConfig(channels=(channels, channels)), backbone_3d=backbone)
    torch.manual_seed(0)
    return randomize(DSVT(config)).to(DEVICE)


def pillars(cells):
    """Coordinates of pillars at (x, y), in the order of voxelization."""
    rows = sorted(set(cells))
    return torch.tensor([(0, 0, y, x) for x, y in rows], dtype=torch.int32, device=DEVICE)


def scattered(count, seed=0):
    cells = np.random.default_rng(seed).choice(32 * 32, count, replace=False)
    return pillars([(int(cell) // 32, int(cell) % 32) for cell in cells])


def block(width, height):
    return [(x, y) for x in range(width) for y in range(height)]


def assert_close_to_torch(network, coords, limit=2e-3):
    """The error as a share of the features' size; float16 rounds off up to 5e-4 of each intermediate value."""
    with torch.inference_mode():
        features = torch.randn(len(coords), network.config.backbone_3d.channels, device=DEVICE)
        partition = partition_sets(coords, network.config)
        found = TritonNetworks(network).sparse(features, partition)
        expected = TorchNetworks(network).sparse(features, partition)
    assert found.dtype == torch.float16
    assert ((found.float() - expected).norm() / expected.norm()).item() < limit
    return features, partition, found


# ------------------------------------------------------------------------------------------------------ set attention


@needs_triton
@pytest.mark.parametrize(
    ("channels", "heads", "set_size", "ffn_channels"),
    [(192, 8, 36, 384), (192, 8, 48, 384), (128, 8, 90, 256), (64, 4, 36, 128), (48, 3, 5, 80)],
    ids=["waymo_pillar", "waymo_voxel", "nuscenes_pillar", "demo", "odd"],
)
def test_sizes_of_models(channels, heads, set_size, ffn_channels):
    """Windows with hardly a voxel, and one with several sets."""
    network = network_of(channels, heads, set_size, ffn_channels, window=10)
    assert_close_to_torch(network, pillars([*block(10, 10), (11, 11), (29, 3), (30, 30), (31, 30)]))


@needs_triton
@pytest.mark.parametrize(
    "coords",
    [
        pytest.param(lambda: pillars([(7, 7)]), id="one voxel, in every slot"),
        pytest.param(lambda: pillars(block(6, 6)), id="a full window without repeated slots"),
        pytest.param(lambda: pillars([*block(6, 6), (20, 20)]), id="full and repeated"),
        pytest.param(lambda: pillars(block(1, 7)), id="sets that share a voxel"),
        pytest.param(lambda: scattered(130), id="more than one program's rows"),
    ],
)
def test_partitions(coords):
    assert_close_to_torch(network_of(16, 2, 6, 32), coords())


@needs_triton
def test_repeated_runs_give_the_same_bytes_and_padding_changes_none():
    network = network_of(16, 2, 6, 32)
    features, partition, expected = assert_close_to_torch(network, scattered(40))
    networks = TritonNetworks(network)
    room = tensors_for(
        sparse_specs(network.config, capacity_for(network.config, 48), "float32")[0], torch.device(DEVICE)
    )
    padded = partition_from_tensors(
        {name: tensor for name, tensor in room.items() if name != "voxel_features"}, network.config.backbone_3d
    )
    write_padded(partition, padded)
    room["voxel_features"][:40] = features
    with torch.inference_mode():
        assert torch.equal(networks.sparse(features, partition), expected)
        output = networks.sparse(room["voxel_features"], padded)
    assert torch.equal(output[:40], expected)
    assert torch.isfinite(output).all()


@needs_triton
def test_the_approximation_of_gelu(monkeypatch):
    import triton
    import triton.language as tl

    # Kernels look functions up among the globals.
    monkeypatch.setitem(globals(), "_gelu", importlib.import_module(KERNELS)._gelu)

    @triton.jit
    def apply(x, y, SIZE: tl.constexpr):  # noqa: N803
        at = tl.arange(0, SIZE)
        tl.store(y + at, _gelu(tl.load(x + at)))  # noqa: F821

    x = torch.cat([torch.linspace(-6, 6, 4090), torch.tensor([-6e4, -100.0, 0.0, 100.0, 6e4, 4.0])]).to(DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, SIZE=4096)
    expected = torch.nn.functional.gelu(x.double())
    assert ((y - expected).abs() / x.abs().clamp(min=1)).max().item() < 2e-4


# ----------------------------------------------------------------------------------------------------- whole networks


@needs_triton
@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_networks_give_what_torch_does(name):
    network = tiny_network(0, name).to(DEVICE)
    model = network.config
    rng = np.random.default_rng(0)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    points = np.column_stack([rng.uniform(low, high, (60, 3)), rng.uniform(0, 1, 60)]).astype(np.float32)
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(points, device=DEVICE), model)
        features, partition = network.vfe(voxels), partition_sets(voxels.coords, model)
        reference, networks = TorchNetworks(network), TritonNetworks(network)
        expected, found = (part.sparse(features, partition) for part in (reference, networks))
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)
        ours, theirs = (
            part.dense(scatter_bev(output, partition.coords, model.grid_size, 1))
            for part, output in ((networks, found), (reference, expected))
        )
    pairs = zip(*(named_maps(maps) for maps in common_proposals(ours, theirs)), strict=True)
    for (key, values), (_, right) in pairs:
        assert not values.is_floating_point() or values.dtype == torch.float32
        torch.testing.assert_close(values.float(), right.float(), rtol=0, atol=3e-2, msg=key)


@needs_triton
def test_detector(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    points = np.random.default_rng(0).uniform([-5, -5, -0.5, 0], [5, 5, 2, 1], (80, 4)).astype(np.float32)
    overrides = {"postprocess.score_threshold": 0.05}
    found, expected = (
        Detector.load(folder, backend=backend, device=DEVICE, overrides=overrides) for backend in ("triton", "torch")
    )
    assert (found.backend, found.precision, found.backend_reason) == ("triton", "fp16", "asked for")
    assert_alike(found.detect(points), expected.detect(points))
    assert len(found.detect(points[:0])) == 0


# ------------------------------------------------------------------------------------------------------------- refusals


@needs_triton
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 5, 6, 160), "1 to 4 times 16, 32 or 64 channels.* has 80 and 160: use torch or tensorrt"),
        ((16, 2, 6, 24), "this model has 16 and 24"),
        ((16, 2, 130, 32), "sets of up to 128 voxels .* this model has 130 and 8"),
        ((128, 1, 6, 128), "this model has 6 and 128"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(sizes, message):
    with pytest.raises(EngineError, match=message):
        TritonNetworks(network_of(*sizes))


@needs_triton
def test_a_cpu_cannot_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EngineError, match="backend triton needs a CUDA device, not cpu; use torch or onnxruntime"):
        TritonNetworks(tiny_network())


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="install triton; a Jetson without it uses torch or tensorrt"):
        TritonNetworks(tiny_network())


@needs_triton
def test_a_triton_that_cannot_compile(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("dsvt_ros.backends.triton.TritonNetworks._run_stage", fail)
    with pytest.raises(EngineError, match="cannot compile or run its kernels here; use torch or tensorrt: no C comp"):
        TritonNetworks(tiny_network().to(DEVICE))


@needs_triton
def test_weights_beyond_float16():
    network = tiny_network().to(DEVICE)
    network.backbone_3d.get_submodule("stage_0.0.encoder_list.0.win_attn.linear1").weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05, beyond the range of float16"):
        TritonNetworks(network)


# ---------------------------------------------------------------------------------------------------------- dsvt verify


@needs_triton
def test_verify(tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model")
    exported, cloud, report = (str(tmp_path / name) for name in ("exported", "cloud.npy", "report.json"))
    np.save(cloud, tiny_points(20))
    assert dsvt(["export", "--model", str(model), "--output", exported]) == 0
    options = ["--cloud", cloud, "--backends", "triton", "--device", DEVICE, "--output", report]
    assert dsvt(["verify", exported, *options]) == 0, capsys.readouterr().out
    (result,) = json.loads(Path(report).read_text())["results"]
    assert (result["backend"], result["precision"], result["limits"]["max_error"]) == ("triton", "fp16", 0.1)
