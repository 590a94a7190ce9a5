"""Weights files: safetensors and pcdet checkpoints, read without running any code that they contain."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsvt_ros.errors import ModelError

# Counters that training keeps and inference never reads; a file may leave them out.
OPTIONAL = ("global_step", "num_batches_tracked")


class _Skipped:
    """Takes the place of a NumPy value while a file is read: nothing of NumPy runs, and nothing is kept."""

    def __new__(cls, *_: object) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Training checkpoints hold such values in the optimizer's state. torch finds a stand-in by its module and name;
# NumPy 2 moved some of them.
_SKIPPED: list[Any] = [
    type(name, (_Skipped,), {"__module__": module, "__qualname__": name})
    for module, names in {
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("scalar", "_reconstruct"),
        "numpy._core.multiarray": ("scalar", "_reconstruct"),
    }.items()
    for name in names
]

# Where shapes tell what the weights were trained for: (key, axis, what to add to its length, what it counts).
_REVEALING = (
    ("vfe.pfn_layers.0.linear.weight", 1, -6, "point features"),
    ("backbone_3d.residual_norm_stage_0.0.weight", 0, 0, "channels in the set-attention backbone"),
    ("dense_head.heads_list.0.hm.1.bias", 0, 0, "classes in its first group"),
    ("dense_head.class_encoding.weight", 1, 0, "classes"),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        path: ``.safetensors``, or a ``torch.save`` file that is a state dict or holds one under ``model_state``
            (OpenPCDet, whose training checkpoints also hold an optimizer's state) or ``state_dict``.

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
        with _skip_numpy():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends to switch the protection off.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign and foreign[1] in {f"{c.__module__}.{c.__qualname__}" for c in _SKIPPED}:
            raise ModelError(
                f"{path} holds NumPy values beside its weights (an optimizer's state), which PyTorch "
                f"{torch.__version__} cannot skip: install PyTorch 2.4 or later, or save its model_state alone"
            ) from None
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


def _skip_numpy() -> AbstractContextManager[object]:
    """Let torch read NumPy values as `_Skipped`, where it can be told to."""
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals(_SKIPPED)
    if hasattr(torch.serialization, "add_safe_globals"):  # PyTorch 2.4 cannot take single ones back
        torch.serialization.add_safe_globals(_SKIPPED)
    return contextlib.nullcontext()


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
        hint = _what_it_was_trained_for(weights, expected) or "is it of another one?"
        raise ModelError(f"{source} does not fit this model ({hint}): {'; '.join(problems)}")
    bad = [k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ModelError(f"{source} holds NaN or infinite values in {', '.join(bad[:5])}")
    network.load_state_dict(weights, strict=False)


def _what_it_was_trained_for(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How the shapes of `weights` say that they belong to another model; empty if they do not."""
    hints = []
    for key, axis, offset, counted in _REVEALING:
        if key in weights and key in expected and weights[key].ndim == expected[key].ndim:
            theirs, ours = (state[key].shape[axis] + offset for state in (weights, expected))
            if theirs != ours:
                hints.append(f"these weights were trained with {theirs} {counted}, the model has {ours}")
    return "; ".join(hints)
