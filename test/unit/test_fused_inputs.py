"""Clouds, wherever and whatever they are, in the tensors of a frame."""

import itertools

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from test_pointcloud2 import XYZI, velodyne_cloud

from dsvt_ros.fused import decode, inputs
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.inputs import FrameInputs
from dsvt_ros.fused.staging import Staging
from dsvt_ros.io.pointcloud2 import raw_from_msg

_interpreter = interpreted("decode_points")

ROOM = 40
COUNTS = (17, 0, 8)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    for module in (inputs, decode):
        monkeypatch.setattr(module, "PART_BYTES", 80)


def forms_of(count, seed):
    """The same points in all forms."""
    points = np.random.default_rng(seed).uniform(-9, 9, (count, 4)).astype(np.float32)
    message = velodyne_cloud(count or 1)
    message.width = count
    for row, point in enumerate(points):
        message.data[22 * row : 22 * row + 16] = type(message.data)("B", point.tobytes())
    return {
        "array": points,
        "columns": np.asfortranarray(points),
        "doubles": torch.as_tensor(points.astype(np.float64)),
        "device": torch.as_tensor(points, device=DEVICE),
        "raw": raw_from_msg(message, XYZI),
    }


CLOUDS = [forms_of(count, seed) for seed, count in enumerate(COUNTS)]
POSES = [np.arange(16.0).reshape(4, 4) + number for number in range(3)]


def check(made, clouds, poses=POSES, seeks=(True, False, True), *, beside=False):
    made.upload(clouds, poses, seeks, beside=beside)
    expected = torch.cat([torch.as_tensor(forms["array"]) for forms in CLOUDS[: len(clouds)]])
    assert torch.equal(made.points[: len(expected)].cpu(), expected)
    assert made.ends.tolist() == np.cumsum(COUNTS[: len(clouds)]).tolist()
    assert torch.equal(made.poses.cpu(), torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32))
    assert made.seeks_ground.tolist() == list(map(int, seeks))


@needs_triton
def test_every_form_beside_every_other():
    made = FrameInputs(ROOM, 3, 4, DEVICE, CloudDecoder(DEVICE, 4))
    addresses = [tensor.data_ptr() for tensor in (made.points, made.poses, made.ends, made.seeks_ground)]
    for number, forms in enumerate(itertools.product(CLOUDS[0], repeat=3)):
        clouds = [cloud[form] for cloud, form in zip(CLOUDS, forms, strict=True)]
        check(made, clouds, beside=number % 3 > 0)
        made.points.fill_(7)
    assert addresses == [tensor.data_ptr() for tensor in (made.points, made.poses, made.ends, made.seeks_ground)]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("form", CLOUDS[0])
def test_one_cloud_that_the_host_reads(form, beside):
    check(FrameInputs(17, 1, 4, DEVICE), [CLOUDS[0][form]], POSES[:1], [True], beside=beside)


def test_uploads_use_memory_in_turns():
    """Two may be under way."""
    made = FrameInputs(ROOM, 1, 4, DEVICE)
    for number in range(4):
        made.upload([np.full((3, 4), number, np.float32)], POSES[:1], [False], beside=True)
        for memory in (made._staging.hosts, made._staging.devices):
            last = [made._parts(values)[0][2, 3].item() for values in memory]
            assert last[1 - number % 2] == number
            assert last[number % 2] == max(number - 1, 0)


@needs_triton
def test_what_goes_beside_the_work_of_the_device(monkeypatch):
    """Points on the host and bytes; poses alone are not worth it."""
    sending, seen = Staging.sending, []

    def noted(self, *, beside):
        seen.append(beside)
        return sending(self, beside=beside)

    monkeypatch.setattr(Staging, "sending", noted)
    made = FrameInputs(17, 1, 4, DEVICE, CloudDecoder(DEVICE, 4))
    for form, beside, expected in (
        ("array", True, [True]), ("array", False, [False]), ("raw", True, [False, True]), ("raw", False, [False] * 2),
    ):  # fmt: skip
        seen.clear()
        check(made, [CLOUDS[0][form]], POSES[:1], [True], beside=beside)
        assert seen == expected


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["array", "raw"])
def test_clouds_travel_while_the_device_works(form):
    """But reach what a frame reads only after that."""
    decoder = CloudDecoder(DEVICE, 4)
    made = FrameInputs(17, 1, 4, DEVICE, decoder)
    check(made, [CLOUDS[0][form]], POSES[:1], [True])  # compiles
    made.points.fill_(7)
    torch.cuda._sleep(10**9)
    seen = made.points.clone()
    made.upload([CLOUDS[0][form]], POSES[:1], [True], beside=True)
    (decoder if form == "raw" else made)._staging._stream.synchronize()
    assert not torch.cuda.current_stream().query(), "the upload has waited"
    assert (seen == 7).all()
    assert torch.equal(made.points.cpu(), torch.as_tensor(CLOUDS[0]["array"]))
