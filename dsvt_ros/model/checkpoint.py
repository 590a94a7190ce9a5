"""Weights files: safetensors and pcdet checkpoints, read without running any code that they contain."""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dsvt_ros.errors import ModelError

# Counters that training keeps and inference never reads; a file may leave them out.
OPTIONAL = ("global_step", "num_batches_tracked")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        path: ``.safetensors``, or a ``torch.save`` file that is a state dict or holds one under ``model_state``
            (OpenPCDet) or ``state_dict``.

    Raises:
        ModelError: The file is missing, corrupt, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is no readable safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends to switch the protection off.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {foreign[1]}, which is more than weights and is never run" if foreign else "is no checkpoint"
        raise ModelError(f"{path} {what}; expected a .safetensors file or a state dict of tensors") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is no readable checkpoint: {error}") from None
    for key in ("model_state", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds no state dict; expected model_state, state_dict or tensors by name")
    return content


def weights_sha256(path: str | Path) -> str:
    """Hash of the weights in a file: the same for a checkpoint and for safetensors made from it.

    Raises:
        ModelError: As `read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights file {path}")
    status = path.stat()
    return _weights_sha256(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _weights_sha256(path: Path, changed_ns: int, size: int) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(read_weights(path).items()):
        if not name.endswith(OPTIONAL):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `network`, strictly.

    Raises:
        ModelError: Keys are missing, unexpected or misshapen; the message lists them.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in weights and not key.endswith(OPTIONAL)]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if keys
    ]
    if problems:
        raise ModelError(f"{source} does not fit this model (is it of another one?): {'; '.join(problems)}")
    bad = [k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ModelError(f"{source} holds NaN or infinite values in {', '.join(bad[:5])}")
    network.load_state_dict(weights, strict=False)
