"""Which backend runs a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from dsvt_ros.backends import BACKENDS, Networks, Progress, no_progress
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.config import EngineConfig
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder

_LOG = logging.getLogger(__name__)


def open_networks(
    backend: str,
    network: DSVT,
    folder: ModelFolder,
    weights: Path,
    device: torch.device,
    config: EngineConfig,
    progress: Progress = no_progress,
    failed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Networks, str]:
    """Make both networks of a model ready.

    Args:
        backend: One of `BACKENDS`.
        network: The model with its weights, in evaluation mode on `device`.
        folder: Where the model comes from; it may hold exported networks.
        weights: The weights file.
        device: Where to run.
        config: Options of the backends.
        progress: Told how long preparations go on; may raise to stop them.
        failed: Of backends whose frames fail here, why: ``auto`` takes no ``triton`` then, and ``torch`` runs without
            frames.

    Returns:
        The networks, and why they were chosen.

    Raises:
        ConfigError: There is no such backend.
        EngineError: The backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    asked_for = "asked for"
    if backend == "auto":
        backend, asked_for = _choose(network, folder, weights, device, config, failed)
        if backend == "triton":
            try:
                return _opened(_open_triton(network, device, progress), device, asked_for)
            except EngineError as error:  # of sizes that the kernels do not take, for one
                failed = {**failed, "triton": str(error)}
                backend, asked_for = _choose(network, folder, weights, device, config, failed)
    networks: Networks
    if backend == "onnxruntime":
        from dsvt_ros.backends.onnxruntime import load_networks as load_onnxruntime

        networks, origin = load_onnxruntime(network, folder, weights, device, config)
    elif backend == "tensorrt":
        from dsvt_ros.backends.tensorrt.load import Source
        from dsvt_ros.backends.tensorrt.load import load_networks as load_tensorrt

        networks, origin = load_tensorrt(Source(network, folder, weights, device, config), progress)
    elif backend == "triton":
        networks, origin = _open_triton(network, device, progress), ""
    else:
        networks, origin = _open_torch(network, device, config, failed.get("torch", ""))
    return _opened(networks, device, f"{asked_for}; {origin}" if origin else asked_for)


def _open_triton(network: DSVT, device: torch.device, progress: Progress) -> Networks:
    from dsvt_ros.backends.triton import TritonNetworks, require_triton

    require_triton(device)
    progress("compiling the kernels", None)
    return TritonNetworks(network)


def _open_torch(network: DSVT, device: torch.device, config: EngineConfig, why_not: str) -> tuple[Networks, str]:
    """On a GPU in half precision and whole frames, unless there is a reason against them."""
    if device.type != "cuda" or config.precision == "fp32":
        return TorchNetworks(network), ""
    if why_not:
        return TorchNetworks(network), f"in single precision: {why_not}"
    from dsvt_ros.backends.torch_frames import TorchFrameNetworks

    try:
        return TorchFrameNetworks(network), ""
    except EngineError as error:  # weights beyond the range of half precision
        return TorchNetworks(network), f"in single precision: {error}"


def _opened(networks: Networks, device: torch.device, reason: str) -> tuple[Networks, str]:
    _LOG.info("backend %s (%s, %s): %s", networks.name, networks.precision, device, reason)
    return networks, reason


def _choose(
    network: DSVT,
    folder: ModelFolder,
    weights: Path,
    device: torch.device,
    config: EngineConfig,
    failed: Mapping[str, str],
) -> tuple[str, str]:
    """The backend for ``auto``, and why: the fastest that is ready, for building engines takes minutes."""
    if device.type != "cuda":
        # Measured on two CPU cores with the demo model: ONNX Runtime takes a tenth less or more, by how the threads of
        # OpenMP wait, and has to be exported to first.
        return "torch", "chosen by auto: needs no export, and nothing else here is much faster"
    why = "engines are given by path"
    if not (config.sparse_path and config.dense_path):
        why = failed.get("triton", "") or _why_not_triton(device)
        if not why:
            return "triton", "chosen by auto: the fastest on a GPU"
        if config.precision == "fp16" and "torch" not in failed:
            # Measured on an H200: 7.2 ms a frame instead of 15.8 with engines, around which stages run one by one.
            return "torch", f"chosen by auto: {why}; its whole frames are faster than engines between other stages"
    from dsvt_ros.backends.tensorrt.load import Source, engines_ready

    try:
        ready = engines_ready(Source(network, folder, weights, device, config))
    except EngineError as error:
        return "torch", f"chosen by auto: {why}; {error}"
    if ready:
        return "tensorrt", f"chosen by auto: {why}, and its engines are built"
    return "torch", (
        f"chosen by auto: {why}; TensorRT would be faster but has no engines for this model and GPU yet; they take "
        f"minutes to build: dsvt build {folder.path}, or backend tensorrt"
    )


def _why_not_triton(device: torch.device) -> str:
    from dsvt_ros.backends.triton import require_triton

    try:
        require_triton(device)
    except EngineError as error:
        return str(error)
    return ""
