"""What kernels can number, and the blocks that they work on."""

import pytest
import torch

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.launch import MAX_CHUNK, MAX_COLUMNS, blocks_of, check_size


def test_matrices_that_kernels_can_number():
    """Elements count with what lies between rows."""
    check_size(torch.empty(2**31 - 1, 1, device="meta"))
    wide = torch.empty(2**24, 128, device="meta")
    check_size(wide[:-1])
    for matrix in (wide, wide[:, :16]):
        with pytest.raises(EngineError, match="16777216 rows are more than the kernels can number"):
            check_size(matrix)


@pytest.mark.parametrize("channels", [16, 48, 64, 96, 128, 192, 320, 384])
def test_blocks_divide_the_channels(channels):
    cpu = torch.device("cpu")
    chunk, columns = blocks_of(channels, 128, cpu)["CHUNK"], blocks_of(128, channels, cpu)["COLUMNS"]
    for extent, most in ((chunk, MAX_CHUNK), (columns, MAX_COLUMNS)):
        assert 16 <= extent <= most
        assert channels % extent == 0
        assert extent & (extent - 1) == 0
