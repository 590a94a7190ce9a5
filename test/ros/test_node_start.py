"""Starting and ending the node: what is refused, and how it says so."""

import signal

import pytest

pytestmark = pytest.mark.ros


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"postprocess__score_treshold": 0.3}, "did you mean postprocess.score_threshold?"),
        ({"postprocess__score_threshold": 3.0}, "postprocess.score_threshold must be at least 0.0 and at most 1.0"),
        ({"backend": "fast"}, "backend must be one of auto, torch"),
        ({"model": "nonesuch"}, "no model nonesuch"),
        ({"weights": "/nonexistent.safetensors"}, "/nonexistent.safetensors"),
        ({"preprocess__sensor_pose": "[0.0, 1.0]"}, "preprocess.sensor_pose takes 6 numbers"),
    ],
    ids=["unknown", "out of range", "choice", "model", "weights", "length"],
)
def test_impossible_start_is_one_sentence_and_exit_code_1(start_node, parameters, message):
    node = start_node(**parameters)
    assert node.process.wait(30) == 1
    assert message in node.output
    assert "Traceback" not in node.output


def test_waits_for_a_manager_and_ends_on_sigterm(start_node, client):
    node = start_node(autostart="false", weights="/nonexistent.safetensors")
    assert not client.change_state(1)
    assert client.status()[1]["state"] == "unconfigured"
    assert node.process.poll() is None
    exit_code, seconds = node.end(signal.SIGTERM)
    assert exit_code == 0
    assert seconds < 2.5
    assert "Traceback" not in node.output
