"""Which backend runs a model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dsvt_ros.backends import BACKENDS, Networks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.config import EngineConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder

_LOG = logging.getLogger(__name__)


def open_networks(
    backend: str, network: DSVT, folder: ModelFolder, weights: Path, device: torch.device, config: EngineConfig
) -> tuple[Networks, str]:
    """Make both networks of a model ready.

    Args:
        backend: One of `BACKENDS`.
        network: The model with its weights, in evaluation mode on `device`.
        folder: Where the model comes from; it may hold exported networks.
        weights: The weights file.
        device: Where to run.
        config: Options of the backends.

    Returns:
        The networks, and why they were chosen.

    Raises:
        ConfigError: There is no such backend.
        EngineError: The backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    networks: Networks
    if backend == "onnxruntime":
        from dsvt_ros.backends.onnxruntime import load_networks

        networks, reason = load_networks(network, folder, weights, device, config)
    else:
        networks = TorchNetworks(network)
        reason = "asked for"
        if backend == "auto":
            # Measured on two CPU cores with the demo model: ONNX Runtime takes a tenth less or more, by how the threads
            # of OpenMP wait, and has to be exported to first.
            reason = "chosen by auto: needs no export, and nothing else here is much faster"
    _LOG.info("backend %s (%s, %s): %s", networks.name, networks.precision, device, reason)
    return networks, reason
