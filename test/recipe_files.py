"""Weights and clouds of the recipe as files, for commands: ``PYTHONPATH=test python test/recipe_files.py FOLDER``."""

import argparse
from pathlib import Path

import numpy as np
import recipe
from reference import load_reference
from safetensors.torch import save_file

SEED = 98
MODELS = ("waymo_pillar", "waymo_voxel", "nuscenes_pillar")
ORDERS = 4
"""Of a cloud's points, so that benchmarks do not find those of the cloud before in caches."""


def write(folder: Path) -> None:
    """``MODEL.safetensors`` of each model; ``waymo_0.npy`` to ``waymo_3.npy``, each with the points of one cloud in
    another order, the first as the recipe gives them, and the same for ``nuscenes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        save_file(load_reference(name).weights, folder / f"{name}.safetensors")
    waymo = recipe.make_points(180_000, SEED, range_m=75.0, ground_z=0.0, time_column=False)
    nuscenes = recipe.make_points(100_000, SEED, range_m=54.0, ground_z=-1.8, time_column=True)
    nuscenes[:, 3] *= 255
    for name, points in (("waymo", waymo), ("nuscenes", nuscenes)):
        random = np.random.default_rng(SEED)
        for number in range(ORDERS):
            np.save(folder / f"{name}_{number}.npy", points)
            points = random.permutation(points)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write weights and clouds of the recipe as files.")
    parser.add_argument("folder", type=Path, help="where to write them; made if it is not there")
    write(parser.parse_args().folder)
