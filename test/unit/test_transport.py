"""Fast DDS is asked for large sockets unless the user chose."""

import pytest

from dsvt_ros.ros import transport


@pytest.fixture
def limit(monkeypatch):
    def set_limit(number):
        monkeypatch.setattr(transport, "socket_buffer_limit", lambda: number)

    return set_limit


def test_large_sockets_by_default(limit):
    limit(transport.BUFFER_BYTES)
    environment = {}
    assert "FASTDDS_BUILTIN_TRANSPORTS" in transport.use_large_sockets(environment)
    assert environment == {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4?sockets_size=4MB"}


@pytest.mark.parametrize(
    "chosen",
    [
        {"FASTDDS_BUILTIN_TRANSPORTS": "SHM"},
        {"FASTDDS_DEFAULT_PROFILES_FILE": "/profile.xml"},
        {"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"},
    ],
)
def test_choice_of_the_user_stands(limit, chosen):
    limit(transport.BUFFER_BYTES)
    environment = dict(chosen)
    assert transport.use_large_sockets(environment) == ""
    assert environment == chosen


def test_small_system_limit_gives_advice(limit):
    limit(212992)
    environment = {}
    assert "sysctl -w net.core.rmem_max=4194304" in transport.use_large_sockets(environment)
    assert environment == {}
