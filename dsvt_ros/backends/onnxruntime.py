"""The exported networks in ONNX Runtime, on CPU or CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsvt_ros.capacity import write_padded
from dsvt_ros.config import EngineConfig, ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.cache import exported_model
from dsvt_ros.export.folder import ExportOptions
from dsvt_ros.export.manifest import ExportedNetwork, Manifest
from dsvt_ros.export.networks import (
    maps_from_tensors,
    partition_from_tensors,
    sparse_inputs,
    tensors_for,
)
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder
from dsvt_ros.structures import HeadMaps, SetPartition


class OnnxRuntimeNetworks:
    """Both networks of an exported model.

    Results are new tensors on every call. On CUDA they are written in place by ONNX Runtime, whose work is done when a
    call returns.
    """

    name = "onnxruntime"
    channels_last = False

    def __init__(
        self,
        model: ModelConfig,
        manifest: Manifest,
        files: Mapping[str, bytes],
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """Load.

        Args:
            model: The model.
            manifest: What the files are.
            files: Their contents by name.
            device: CPU or CUDA device of all tensors.
            threads: CPU threads; None takes as many as torch has.

        Raises:
            EngineError: ONNX Runtime is missing, has no provider for `device`, or refuses a file.
        """
        if set(manifest.networks) != {"sparse", "dense"}:
            raise EngineError(
                f"the export of {manifest.model} has the interface {manifest.interface}, which detects nothing by "
                f"itself; export with the interface dsvt_ros"
            )
        self._model = model
        self.precision = manifest.precision
        self.max_voxels = manifest.capacity.voxels if manifest.capacity else None
        self._sparse, self._dense = (
            Session(manifest.networks[name], files[manifest.networks[name].file], device, threads)
            for name in ("sparse", "dense")
        )
        self._room = tensors_for(self._sparse.inputs, device) if manifest.capacity else {}

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) of the last stage.

        Raises:
            EngineError: There are more voxels than the networks have room for, or running fails.
        """
        count = len(features)
        if count == 0:
            return features
        if self._room:
            if count > len(self._room["voxel_features"]):
                raise EngineError(
                    f"{count} voxels, but the exported network has room for {self.max_voxels}; keep the nearest "
                    f"or export with --voxels {count}"
                )
            self._room["voxel_features"][:count] = features
            write_padded(partition, partition_from_tensors(self._room, self._model.backbone_3d))
        (output,) = self._sparse.run(self._room or sparse_inputs(features, partition))
        return output[: len(partition.coords)].float()

    def dense(self, bev: Tensor) -> HeadMaps:
        """(1, D, H, W) BEV map to what the head says.

        Raises:
            EngineError: Running fails.
        """
        outputs = self._dense.run({"bev": bev})
        return maps_from_tensors(
            {spec.name: values for spec, values in zip(self._dense.outputs, outputs, strict=True)}, self._model
        )


class Session:
    """One ONNX file in ONNX Runtime, run on torch tensors without copies."""

    def __init__(self, network: ExportedNetwork, content: bytes, device: torch.device, threads: int | None) -> None:
        ort = require_onnxruntime(device)
        self.inputs, self.outputs = network.inputs, network.outputs
        self._file, self._device, self._ort = network.file, device, ort
        provider: str | tuple[str, dict[str, Any]] = "CPUExecutionProvider"
        if device.type == "cuda":
            provider = ("CUDAExecutionProvider", {"device_id": device.index or 0})
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Its threads would wait for the next call in a loop and take the cores from the stages that torch runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # its exceptions have no common base
            raise EngineError(f"ONNX Runtime {ort.__version__} cannot load {network.file}: {error}") from None
        # Where CUDA libraries are missing, ONNX Runtime goes on with the CPU.
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot use CUDA here: its CUDA or cuDNN libraries do not load"
            )
        for kind, found, expected in (
            ("takes", self._session.get_inputs(), self.inputs),
            ("gives", self._session.get_outputs(), self.outputs),
        ):
            names = [value.name for value in found]
            if names != [spec.name for spec in expected]:
                raise EngineError(
                    f"{network.file} {kind} {', '.join(names)}; its manifest says "
                    f"{', '.join(spec.name for spec in expected)}"
                )

    def run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Run on tensors by name; they are brought to the types of the file.

        Raises:
            EngineError: Running fails, such as for a tensor of the wrong shape.
        """
        ready = {
            spec.name: tensors[spec.name].to(self._device, getattr(torch, spec.type)).contiguous()
            for spec in self.inputs
        }
        try:
            return self._run_cuda(ready) if self._device.type == "cuda" else self._run_cpu(ready)
        except Exception as error:
            raise EngineError(f"ONNX Runtime {self._ort.__version__} cannot run {self._file}: {error}") from error

    def _run_cpu(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = self._session.run(None, {name: values.numpy() for name, values in tensors.items()})
        return [torch.from_numpy(values) for values in outputs]

    def _run_cuda(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        binding, index = self._session.io_binding(), self._device.index or 0
        sizes = {
            name: extent
            for spec in self.inputs
            for name, extent in zip(spec.shape, tensors[spec.name].shape, strict=True)
            if isinstance(name, str)
        }
        results = [
            torch.empty(
                [sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape],
                dtype=getattr(torch, spec.type),
                device=self._device,
            )
            for spec in self.outputs
        ]
        for bind, specs, values in (
            (binding.bind_input, self.inputs, [tensors[spec.name] for spec in self.inputs]),
            (binding.bind_output, self.outputs, results),
        ):
            for spec, tensor in zip(specs, values, strict=True):
                bind(spec.name, "cuda", index, _numpy_type(spec.type), list(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)
        return results


def load_networks(
    network: DSVT, folder: ModelFolder, weights: Path, device: torch.device, config: EngineConfig
) -> tuple[OnnxRuntimeNetworks, str]:
    """The exported networks of a model folder, or, where it has none for these weights, such as the cache holds.

    Args:
        network: The model, for an export.
        folder: Its folder.
        weights: Weights file.
        device: Where to run.
        config: Threads and cache folder.

    Returns:
        The networks, and where they come from.

    Raises:
        EngineError: The folder's files are damaged or do not belong together, or the export fails.
    """
    require_onnxruntime(device)
    # Counts are left open: ONNX Runtime needs no padding.
    exported = exported_model(network, folder, weights, ExportOptions(), config)
    networks = OnnxRuntimeNetworks(folder.model, exported.manifest, exported.files, device, config.threads or None)
    return networks, f"networks of {exported.where}"


def require_onnxruntime(device: torch.device) -> Any:
    """The module onnxruntime.

    Raises:
        EngineError: It is missing, or has nothing that runs on `device`.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise EngineError(
            f"backend onnxruntime needs the package onnxruntime ({error}): pip install onnxruntime"
        ) from None
    if device.type == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineError(
            f"onnxruntime {ort.__version__} has no CUDA provider (only {', '.join(ort.get_available_providers())}): "
            f"install onnxruntime-gpu, or use device cpu"
        )
    return ort


def _numpy_type(name: str) -> Any:
    import numpy as np

    return np.dtype(name)
