"""Weights and clouds of the recipe as files, for commands: ``PYTHONPATH=test python test/recipe_files.py FOLDER``."""

import argparse
from pathlib import Path

import numpy as np
import recipe
from reference import load_reference
from safetensors.torch import save_file

SEED = 98
MODELS = ("waymo_pillar", "waymo_voxel", "nuscenes_pillar")


def write(folder: Path) -> None:
    """``MODEL.safetensors`` of each model, and the clouds ``waymo.npy`` and ``nuscenes.npy`` in their columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        save_file(load_reference(name).weights, folder / f"{name}.safetensors")
    np.save(
        folder / "waymo.npy", recipe.make_points(180_000, SEED, range_m=75.0, ground_z=0.0, time_column=False)
    )
    points = recipe.make_points(100_000, SEED, range_m=54.0, ground_z=-1.8, time_column=True)
    points[:, 3] *= 255
    np.save(folder / "nuscenes.npy", points)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write weights and clouds of the recipe as files.")
    parser.add_argument("folder", type=Path, help="where to write them; made if it is not there")
    write(parser.parse_args().folder)
