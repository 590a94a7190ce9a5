"""``dsvt train``: train the embedded model anew, from a seed, on simulated scans."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from dsvt_ros.config import flatten, parse_assignment, with_overrides
from dsvt_ros.detector import choose_device
from dsvt_ros.model.folder import open_model
from dsvt_ros.training.recipe import TrainConfig, train


def main(argv: list[str]) -> int:
    """Train; see ``dsvt train --help``."""
    recipe = TrainConfig()
    parser = argparse.ArgumentParser(
        prog="dsvt train",
        description="Train a network on simulated lidar scans. Everything follows from the seed.",
        epilog="recipe: " + "  ".join(f"{key}={value}" for key, value in flatten(recipe)),
    )
    parser.add_argument("--model", default="demo", help="whose model.yaml to train (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for weights and log")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="part of the recipe"
    )
    options = parser.parse_args(argv)
    recipe = with_overrides(recipe, dict(parse_assignment(text) for text in options.overrides))
    folder = open_model(options.model)
    device = choose_device(options.device)
    print(f"training {folder.model.name} on {device}: {dataclasses.asdict(recipe)}", flush=True)
    best = train(folder.model, folder.defaults, recipe, options.output, device, lambda line: print(line, flush=True))
    print(f"wrote {best}")
    return 0
