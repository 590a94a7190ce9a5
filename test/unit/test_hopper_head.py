"""The convolutions of a head to few channels, which only a Hopper GPU can run.

A fault in how parts of the kernel wait for each other may be one that never ends: run this with `timeout 60`.
"""

import pytest
import torch
import torch.nn.functional as F
from fused_fixtures import DEVICE, needs_triton
from torch import nn

from dsvt_ros.errors import EngineError
from dsvt_ros.fused import launch
from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.heatmaps import HopperHeadConvolution, HopperHeatmaps
from dsvt_ros.fused.launch import is_hopper

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.skipif(not is_hopper(DEVICE), reason="needs a Hopper GPU"),
]

MAPS = pytest.mark.parametrize(
    ("clouds", "height", "width"),
    [(1, 7, 15), (1, 8, 16), (1, 33, 17), (3, 40, 31), (2, 111, 95), (1, 239, 319), (1, 468, 468)],
    ids=["1 tile", "4 tiles", "small", "3 clouds", "2 clouds", "large", "full size"],
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Numbers that nothing writes are not any."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(torch.nan))


def convolution(channels_in, channels_out, seed=0):
    """Weights that float16 holds, for values of the size of its input."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1).requires_grad_(False)
    conv.weight.normal_(std=(2 / (9 * channels_in)) ** 0.5).copy_(conv.weight.half())
    conv.bias.normal_()
    return conv.to(DEVICE)


def rows_of(channels, clouds, height, width, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rows = torch.zeros(clouds, height + 1, width + 1, channels, dtype=torch.float16, device=DEVICE)
    rows[:, :height, :width].normal_(generator=generator)
    return BevRows(rows.flatten(0, 2), height, width)


def assert_close(found, expected):
    assert ((found.float() - expected).norm() / expected.norm()).item() < 1e-3
    torch.testing.assert_close(found.float(), expected, rtol=3e-3, atol=3e-3)


@MAPS
@pytest.mark.parametrize("channels", [64, 128, 384])
def test_convolution(channels, clouds, height, width):
    conv = convolution(channels, 64)
    x = rows_of(channels, clouds, height, width)
    found = HopperHeadConvolution(FusedConvolution(conv))(x)
    assert_close(found.image(), F.relu(conv(x.image().float())))
    cells = found.rows.view(-1, height + 1, width + 1, 64)
    assert (cells[:, -1] == 0).all()
    assert (cells[:, :, -1] == 0).all()


@MAPS
def test_heatmaps(clouds, height, width):
    """Of the first of the channels there are."""
    hidden, output = convolution(64, 64), convolution(64, 8, seed=1)
    x = rows_of(64, clouds, height, width)
    found = HopperHeatmaps(FusedConvolution(hidden), FusedConvolution(output), 3)(x)
    assert found.is_contiguous()
    assert_close(found, output(F.relu(hidden(x.image().float())))[:, :3])


@pytest.mark.parametrize("classes", [1, 7])
def test_numbers_of_classes(classes):
    hidden, output = convolution(64, 64), convolution(64, classes, seed=1)
    x = rows_of(64, 2, 20, 30)
    found = HopperHeatmaps(FusedConvolution(hidden), FusedConvolution(output), classes)(x)
    assert_close(found, output(F.relu(hidden(x.image().float()))))


def test_repeated_runs_give_the_same_bytes():
    """Of several inputs, one right after the other, with something else on the GPU at the same time."""
    shared = HopperHeadConvolution(FusedConvolution(convolution(384, 64)))
    heatmaps = HopperHeatmaps(FusedConvolution(convolution(64, 64)), FusedConvolution(convolution(64, 3)), 3)
    inputs = [rows_of(384, *size, seed) for seed, size in enumerate([(1, 468, 468), (2, 111, 95), (1, 333, 468)])]

    def convolved(x):
        between = shared(x)
        return between.rows, heatmaps(between)

    expected = [convolved(x) for x in inputs]
    different = torch.zeros(len(inputs), 2, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        for x, theirs, row in zip(inputs, expected, different, strict=True):
            for one, two, cell in zip(convolved(x), theirs, row, strict=True):
                cell += (one.view(torch.int16) != two.view(torch.int16)).any()
    matrix = torch.randn(2048, 2048, device=DEVICE).half()
    for _ in range(1000):
        graph.replay()
        with torch.cuda.stream(other):
            torch.mm(matrix, matrix)
    torch.cuda.synchronize()
    assert different.tolist() == [[0, 0]] * len(inputs)


def test_other_convolutions_are_not_taken():
    def fused(channels_in, channels_out):
        return FusedConvolution(convolution(channels_in, channels_out))

    assert HopperHeadConvolution.take(fused(192, 64))
    assert not HopperHeadConvolution.take(fused(32, 64))
    assert not HopperHeadConvolution.take(fused(64, 128))
    assert not HopperHeadConvolution.take(FusedConvolution(nn.Conv2d(64, 64, 1).to(DEVICE)))
    assert not HopperHeadConvolution.take(FusedConvolution(nn.Conv2d(64, 64, 3, 2, padding=1).to(DEVICE)))
    assert HopperHeatmaps.take(fused(64, 64), 7)
    assert not HopperHeatmaps.take(fused(64, 64), 8)
    assert not HopperHeatmaps.take(fused(128, 64), 3)


def test_more_cells_than_the_kernels_can_number(monkeypatch):
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 961 * 64 - 1)
    with pytest.raises(EngineError, match="961 rows are more than the kernels can number"):
        HopperHeadConvolution(FusedConvolution(convolution(64, 64)))(rows_of(64, 1, 30, 30))
