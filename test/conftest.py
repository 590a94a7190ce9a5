"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from dsvt_ros.host_threads import spin_briefly

spin_briefly()
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, of which each has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from reference import Reference, load_reference  # noqa: E402

# Triton decides when it is imported whether its own functions are interpreted, and much imports it along the way.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

# Or what fails in these would not say which values it compared.
pytest.register_assert_rewrite(
    "encoder_cases", "overlapping_boxes", "partition_cases", "published_networks", "small_frames", "voxel_cases"
)

# On a GPU, TF32 would round the inputs of a reference's convolutions to 10 bits.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def waymo() -> Reference:
    """The published waymo_pillar: outputs, cloud and seeded weights."""
    return load_reference("waymo_pillar")


@pytest.fixture(scope="session")
def waymo_points(waymo: Reference) -> np.ndarray:
    """The cloud that the reference was computed from; intensity and elongation go in unscaled."""
    return waymo.points


@pytest.fixture(scope="session")
def waymo_weights(waymo: Reference) -> dict[str, torch.Tensor]:
    """The seeded weights that the reference was computed with."""
    return waymo.weights


@pytest.fixture(scope="session")
def waymo_checkpoint(waymo_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a pcdet checkpoint."""
    path = tmp_path_factory.mktemp("waymo") / "checkpoint.pth"
    torch.save({"model_state": waymo_weights, "epoch": 12}, path)
    return path
