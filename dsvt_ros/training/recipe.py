"""How the embedded model is trained: an endless stream of simulated scans, one network, one GPU."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dsvt_ros.config import DetectorConfig, ModelConfig, option, with_overrides
from dsvt_ros.detector import Detector
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.preprocess import scale_features
from dsvt_ros.training.evaluation import SCORE_THRESHOLD, evaluate_simulated
from dsvt_ros.training.losses import compute_losses
from dsvt_ros.training.simulator import Scan, SceneStream, SensedScene, cast
from dsvt_ros.training.targets import make_targets
from dsvt_ros.voxelization import voxelize


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what is learned."""

    seed: int = option(0, help="seed of the weights and of the stream of scenes", minimum=0)
    steps: int = option(12000, help="optimizer steps", minimum=1)
    batch_size: int = option(16, help="scans a step", minimum=1)
    repeats: int = option(2, help="steps that each simulated batch is used for, augmented anew", minimum=1)
    learning_rate: float = option(3e-3, help="highest learning rate", minimum=0.0)
    weight_decay: float = option(0.01, help="AdamW's weight decay", minimum=0.0)
    warmup: float = option(0.1, help="share of the steps in which the learning rate rises", minimum=0.0, maximum=1.0)
    average: float = option(0.999, help="decay of the running average of the weights", minimum=0.0, maximum=1.0)
    height_jitter_m: float = option(0.15, help="deviation of the ground's height from the model's", minimum=0.0)
    validate_every: int = option(2000, help="steps between validations", minimum=1)
    validation_scenes: int = option(48, help="scenes of the validation split", minimum=1)
    workers: int = option(12, help="processes that lay out scenes", minimum=0)


class _Scenes(Dataset[SensedScene]):
    """The training split as an indexed data set, so that the loader's processes can share the work."""

    def __init__(self, seed: int, length: int) -> None:
        self._stream = SceneStream("train", seed)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> SensedScene:
        return self._stream[index]


def train(
    model: ModelConfig,
    defaults: DetectorConfig,
    config: TrainConfig,
    output: Path,
    device: torch.device,
    report: Callable[[str], None],
) -> Path:
    """Train a network on simulated scans.

    Args:
        model: The network.
        defaults: Run-time options that validation detects with.
        config: The recipe.
        output: Folder for ``weights.safetensors`` (the best on validation), ``last.safetensors`` and ``log.json``.
        device: Where to train.
        report: Called with a line of progress every 100 steps and after every validation.

    Returns:
        The path of the best weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    network = DSVT(model).to(device)
    network.backbone_2d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.dense_head.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    augmentation = torch.Generator(device).manual_seed(config.seed)

    validation_options = with_overrides(defaults, {"postprocess.score_threshold": SCORE_THRESHOLD})
    best, log, start = -1.0, [], time.monotonic()
    running: list[Tensor] = []
    for step, scan in enumerate(_batches(config, device), 1):
        network.train()
        seen = augment(scan, config.height_jitter_m, augmentation)
        voxels = voxelize(scale_features(seen.points, model, defaults.preprocess), model, seen.batch_index)
        targets = make_targets(seen.boxes, seen.labels, seen.num_points, seen.box_batch_index, config.batch_size, model)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            maps = network(voxels)
        losses = compute_losses(maps, targets, model)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        _update_average(average, network, min(config.average, (step + 1) / (step + 10)))

        running.append(torch.stack([losses.heatmap, losses.regression, losses.iou]).detach())
        if step % 100 == 0:
            heatmap, regression, iou = torch.stack(running).mean(0).tolist()
            running.clear()
            elapsed = time.monotonic() - start
            left = elapsed / step * (config.steps - step)
            report(
                f"step {step}/{config.steps}  heatmap {heatmap:.3f}  regression {regression:.3f}  iou {iou:.3f}  "
                f"{step / elapsed:.1f} steps/s  {left / 60:.1f} min left"
            )
        if step % config.validate_every == 0 or step == config.steps:
            save_weights(average, output / "last.safetensors")
            detector = Detector(average, validation_options, device)
            result = evaluate_simulated(detector, SceneStream("validation"), range(config.validation_scenes))
            mean = float(np.mean(list(result.ap.values())))
            log.append({"step": step, "ap": result.ap, "minutes": (time.monotonic() - start) / 60})
            if mean > best:
                best = mean
                save_weights(average, output / "weights.safetensors")
            report("validation  " + "  ".join(f"{name} {ap:.1f}" for name, ap in result.ap.items()))
            (output / "log.json").write_text(json.dumps({"config": asdict(config), "log": log}, indent=1) + "\n")
        if step == config.steps:
            break
    return output / "weights.safetensors"


def augment(scan: Scan, height_jitter_m: float, generator: torch.Generator) -> Scan:
    """Mirror, turn, scale, lift and thin every scan of a batch at random."""
    device, batch_size = scan.points.device, scan.batch_size

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, generator=generator, device=device)

    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    # Cars differ in size between countries; real ones also return fewer points than simulated ones.
    angle, scale = uniform(-math.pi / 4, math.pi / 4), uniform(0.88, 1.06)
    lift = height_jitter_m * torch.randn(batch_size, generator=generator, device=device)
    kept_share = torch.where(uniform(0, 1) < 0.5, uniform(0.4, 1), 1.0)

    def move(xyz: Tensor, index: Tensor) -> Tensor:
        x, y = xyz[:, 0], xyz[:, 1] * mirror[index]
        cos, sin = torch.cos(angle[index]), torch.sin(angle[index])
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos, xyz[:, 2]], dim=1) * scale[index, None]
        turned[:, 2] += lift[index]
        return turned

    draw = torch.rand(len(scan.points), generator=generator, device=device)
    kept = draw < kept_share[scan.batch_index]
    points, index, owner = scan.points[kept], scan.batch_index[kept], scan.object_index[kept]
    box_index = scan.box_batch_index
    yaw = scan.boxes[:, 6:] * mirror[box_index, None] + angle[box_index, None]
    size = scan.boxes[:, 3:6] * scale[box_index, None]
    return dataclasses.replace(
        scan,
        points=torch.cat([move(points[:, :3], index), points[:, 3:]], dim=1),
        batch_index=index,
        boxes=torch.cat([move(scan.boxes[:, :3], box_index), size, yaw], dim=1),
        num_points=torch.bincount(owner[owner >= 0], minlength=len(scan.boxes)),
        object_index=owner,
    )


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the state dict without training's counters, replacing `path` at once."""
    from safetensors.torch import save_file

    state = {
        key: value.detach().contiguous().cpu()
        for key, value in network.state_dict().items()
        if value.is_floating_point()
    }
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.replace(path)


def _batches(config: TrainConfig, device: torch.device) -> Iterator[Scan]:
    """Simulated batches, each as often as `config.repeats` says."""
    num_batches = -(-config.steps // config.repeats)
    loader = DataLoader(
        _Scenes(config.seed, num_batches * config.batch_size),
        batch_size=config.batch_size,
        num_workers=config.workers,
        collate_fn=list,
        persistent_workers=False,
    )
    for index, scenes in enumerate(loader):
        scan = cast(scenes, seed=config.seed * num_batches + index, device=device)
        for _ in range(config.repeats):
            yield scan


def _rate(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to nothing."""
    rise = max(1.0, config.warmup * config.steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, config.steps - rise))))


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the trained ones; running statistics of batch norms too."""
    mine, theirs = average.state_dict(), network.state_dict()
    floating = [key for key, value in mine.items() if value.is_floating_point()]
    torch._foreach_lerp_([mine[key] for key in floating], [theirs[key] for key in floating], 1 - decay)
