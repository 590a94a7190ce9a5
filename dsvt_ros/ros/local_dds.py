"""ROS processes that talk to each other on this machine and to nobody else, without losing large clouds.

With default settings practically every best-effort cloud of 180,000 points (4 MB) is lost between two processes, since
one lost datagram of some sixty loses the message and the socket buffers hold a fraction of it. The profile in
``local_dds.xml`` gives them 4 MB. Restricting discovery with ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST instead would
replace the transports and with them that cure.
"""

from __future__ import annotations

import random
import socket
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import as_file, files
from pathlib import Path

BUFFER_BYTES = 4 * 1024 * 1024
"""Send and receive buffer of each socket, as in ``local_dds.xml``."""

DOMAIN_IDS = range(1, 102)
"""Domains whose ports lie below those that Linux hands out to clients (32768), and not the default domain."""


def isolated_environment(domain_id: int | None = None) -> dict[str, str]:
    """Environment variables for processes that share one isolated ROS graph.

    All of them need the same variables, set before ``rclpy.init``: call this once and hand the result to every process.

    Args:
        domain_id: Domain of the graph; a free one by default.

    Returns:
        The variables to set, in addition to those that are there.

    Raises:
        ValueError: The domain has ports outside of those kept for it.
        OSError: No free domain.
    """
    if domain_id is None:
        domain_id = free_domain_id()
    elif domain_id not in (0, *DOMAIN_IDS):
        raise ValueError(f"domain {domain_id} is not in 0 to {DOMAIN_IDS[-1]}")
    return {
        "ROS_DOMAIN_ID": str(domain_id),
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
        _profile_variable(): str(profile_path()),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SYSTEM_DEFAULT",
        "ROS_LOCALHOST_ONLY": "0",
        "ROS_STATIC_PEERS": "",
    }


def profile_path() -> Path:
    """Where the Fast DDS profile lies on disk."""
    with as_file(files("dsvt_ros.ros") / "local_dds.xml") as path:
        return path


def _profile_variable() -> str:
    """How Fast DDS wants to be told of a profile: Kilted (rclpy 9) warns of the name that Jazzy and Humble need."""
    try:
        major = int(version("rclpy").split(".")[0])
    except (PackageNotFoundError, ValueError):
        return "FASTDDS_DEFAULT_PROFILES_FILE"
    return "FASTDDS_DEFAULT_PROFILES_FILE" if major >= 8 else "FASTRTPS_DEFAULT_PROFILES_FILE"


def free_domain_id() -> int:
    """A random domain of which no participant runs on this machine.

    Raises:
        OSError: All domains are taken.
    """
    for domain_id in random.sample(DOMAIN_IDS, len(DOMAIN_IDS)):
        if _is_free(domain_id):
            return domain_id
    raise OSError(f"ROS domains {DOMAIN_IDS[0]} to {DOMAIN_IDS[-1]} all have participants on this machine")


def _is_free(domain_id: int) -> bool:
    """Whether the first unicast port of a domain can be had, which its first participant takes (DDSI-RTPS 9.6.1)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", 7410 + 250 * domain_id))
        except OSError:
            return False
    return True


def socket_buffer_limit() -> int | None:
    """The largest receive buffer that the system grants, in bytes; None where it does not tell.

    Below `BUFFER_BYTES` large best-effort clouds get lost; ``sysctl net.core.rmem_max=4194304`` raises it.
    """
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text())
    except (OSError, ValueError):
        return None
