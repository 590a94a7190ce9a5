"""How large clouds reach this process over Fast DDS."""

from __future__ import annotations

from collections.abc import MutableMapping

from dsvt_ros.ros.local_dds import BUFFER_BYTES, socket_buffer_limit

TRANSPORT = "UDPv4?sockets_size=4MB"

CHOICES_OF_THE_USER = (
    "FASTDDS_BUILTIN_TRANSPORTS",
    "FASTDDS_DEFAULT_PROFILES_FILE",
    "FASTRTPS_DEFAULT_PROFILES_FILE",
)


def use_large_sockets(environment: MutableMapping[str, str]) -> str:
    """Ask Fast DDS for receive buffers that hold a whole cloud; call it before `rclpy.init`.

    With the default buffers, best-effort clouds of a few megabytes are lost: a single missing
    datagram of the burst loses the cloud. Nothing is changed where the user chose a transport or
    another middleware.

    Args:
        environment: `os.environ`.

    Returns:
        What was done, or advice; empty if there is nothing to say.
    """
    if environment.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp") != "rmw_fastrtps_cpp":
        return ""
    if any(environment.get(name) for name in CHOICES_OF_THE_USER):
        return ""
    available = socket_buffer_limit()
    if available is None:
        return ""
    if available < BUFFER_BYTES:
        return (
            f"net.core.rmem_max is {available} bytes, too small for large best-effort clouds, which may get lost: "
            f"run sudo sysctl -w net.core.rmem_max={BUFFER_BYTES}, or publish reliably and set qos.reliability"
        )
    environment["FASTDDS_BUILTIN_TRANSPORTS"] = TRANSPORT
    return (
        f"receiving with FASTDDS_BUILTIN_TRANSPORTS={TRANSPORT}, so that large clouds do not get lost; "
        "set that variable to choose otherwise"
    )
