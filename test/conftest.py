"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

from dsvt_ros.host_threads import spin_briefly

spin_briefly()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import recipe  # noqa: E402
import torch  # noqa: E402

DATA = Path(__file__).parent / "data"
SEED = 11


@pytest.fixture(scope="session")
def waymo_reference() -> dict[str, np.ndarray]:
    """What the published modules computed."""
    with np.load(DATA / "waymo_pillar" / "reference.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def waymo_points() -> np.ndarray:
    """The cloud that the reference was computed from; intensity and elongation go in unscaled."""
    return recipe.make_points(9000, SEED, range_m=75.0, ground_z=0.0, time_column=False)


@pytest.fixture(scope="session")
def waymo_weights(waymo_reference: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The seeded weights that the reference was computed with."""
    weights = recipe.make_weights(recipe.read_keys(DATA / "waymo_pillar" / "keys.txt"), SEED)
    for name, value in waymo_reference.items():
        if name.startswith("override__"):
            weights[name.removeprefix("override__")] = value
    return {key: torch.as_tensor(value) for key, value in weights.items()}


@pytest.fixture(scope="session")
def waymo_checkpoint(waymo_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a pcdet checkpoint."""
    path = tmp_path_factory.mktemp("waymo") / "checkpoint.pth"
    torch.save({"model_state": waymo_weights, "epoch": 12}, path)
    return path
