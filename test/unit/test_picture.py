"""The bird's-eye picture: forward is up, left is left."""

import numpy as np
import pytest

from dsvt_ros.errors import DataError
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools.picture import draw_bev

pytest.importorskip("matplotlib")
from matplotlib.image import imread

CLASSES = ("car", "pedestrian", "cyclist")
NONE = Boxes3D(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), CLASSES)


def test_box_lies_where_it_is(tmp_path):
    car = np.array([[20.0, 20.0, 0.0, 8.0, 8.0, 2.0, 0.0]], np.float32)
    box = Boxes3D(car, np.array([0.9], np.float32), np.array([0]), CLASSES)
    draw_bev(np.zeros((0, 3), np.float32), box, None, tmp_path / "box.png", "box")
    draw_bev(np.zeros((0, 3), np.float32), box, box, tmp_path / "truth.png", "box")
    picture = imread(tmp_path / "box.png")[..., :3]
    height, width, _ = picture.shape
    blue = (picture[..., 2] > 0.7) & (picture[..., 0] < 0.4)
    blue[:, : width // 10] = blue[: height // 10, -width // 3 :] = False  # the legend
    rows, columns = np.nonzero(blue)
    assert rows.mean() < height / 2
    assert columns.mean() < width / 2


@pytest.mark.parametrize("points", [np.zeros((0, 4)), np.full((3, 4), np.nan), np.ones((1, 3))])
def test_little_to_draw(points, tmp_path):
    draw_bev(points.astype(np.float32), NONE, NONE, tmp_path / "little.png", "little")
    assert (tmp_path / "little.png").stat().st_size > 0


def test_unwritable_picture_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot write the picture"):
        draw_bev(np.zeros((0, 3), np.float32), NONE, None, tmp_path / "nowhere" / "a.png", "")
