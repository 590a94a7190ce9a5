"""Layer norms of sums against those of PyTorch in float32."""

import pytest
import torch
import torch.nn.functional as F
from fused_fixtures import DEVICE

from dsvt_ros.padded.norm import ROWS, CompiledNorm, library_norm, sum_norm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

COUNTS = [0, 1, ROWS, 10 * ROWS + 3]


def assert_right(norm, count, channels, adds):
    torch.manual_seed(count)
    x, other = (3 * torch.randn(2, count, channels, device=DEVICE) + 1).half()
    weight, bias = torch.randn(2, channels, device=DEVICE).half()
    before = x.clone()
    with torch.inference_mode():
        found = norm(x, weight, bias, other if adds else None)
    total = x.float() + other.float() if adds else x.float()
    expected = F.layer_norm(total, (channels,), weight.float(), bias.float())
    assert found.dtype == torch.float16
    # The sum may have been rounded to float16, in which numbers up to 16 are 0.008 apart.
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("adds", [False, True], ids=["one", "sum"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("channels", [192, 128, 36, 16, 15, 1500])
def test_quickest_here(count, channels, adds):
    assert_right(sum_norm(DEVICE, channels), count, channels, adds)


def test_rows_that_hardly_vary():
    """What is added to their variance counts."""
    torch.manual_seed(0)
    x = (0.003 * torch.randn(9, 64, device=DEVICE)).half()
    weight, bias = torch.ones(64, device=DEVICE).half(), torch.zeros(64, device=DEVICE).half()
    expected = F.layer_norm(x.float(), (64,))
    assert expected.std() < 0.8, "without it, this would be 1"
    torch.testing.assert_close(sum_norm(DEVICE, 64)(x, weight, bias).float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("adds", [False, True], ids=["one", "sum"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("channels", [192, 128, 64, 48, 2, 1024])
def test_compiled(count, channels, adds):
    assert_right(CompiledNorm(channels), count, channels, adds)


@pytest.mark.gpu
@needs_gpu
def test_rows_of_one_value():
    """Without variance, all that is left is the bias."""
    x = torch.full((5, 64), 7.0, device=DEVICE).half()
    weight, bias = torch.randn(2, 64, device=DEVICE).half()
    torch.testing.assert_close(CompiledNorm(64)(x, weight, bias), bias.expand(5, -1), rtol=0, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_it_is_compiled_here():
    assert isinstance(sum_norm(DEVICE, 192), CompiledNorm)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("error", [AttributeError, ImportError, OSError, RuntimeError])
def test_builds_of_torch_that_cannot_compile(monkeypatch, error):
    def fails(*_args):
        raise error("not in this build")

    monkeypatch.setattr("dsvt_ros.padded.norm.CompiledNorm.__init__", fails)
    assert sum_norm(DEVICE, 192) is library_norm


@pytest.mark.gpu
@needs_gpu
def test_kernel_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr("dsvt_ros.padded.norm.CompiledNorm.__call__", lambda _self, x, *_others: x)
    assert sum_norm(DEVICE, 192) is library_norm
