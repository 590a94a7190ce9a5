"""What commands write with ``--output``."""

import json

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny_points, write_tiny_model

from dsvt_ros.errors import DataError
from dsvt_ros.tools import cli
from dsvt_ros.tools.result_file import write_result


def test_content_and_what_is_said(capsys, tmp_path):
    write_result(tmp_path / "result.json", {"map": 25.0}, Console(soft_wrap=True))
    assert json.loads((tmp_path / "result.json").read_text()) == {"map": 25.0}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'result.json'}\n"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be written: Is a directory"):
        write_result(tmp_path, {}, Console())


@pytest.mark.parametrize("command", ["benchmark", "detect"])
def test_commands_say_so_in_a_sentence(command, capsys, tmp_path):
    np.save(tmp_path / "cloud.npy", tiny_points())
    clouds = {"benchmark": ["--runs", "1", "--cloud"], "detect": ["--columns", "x,y,z,intensity"]}[command]
    model = ["--model", str(write_tiny_model(tmp_path / "tiny")), "--device", "cpu"]
    assert cli.main([command, *model, *clouds, str(tmp_path / "cloud.npy"), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"dsvt {command}: {tmp_path} cannot be written: Is a directory\n"
