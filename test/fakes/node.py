"""The node on that machine: ``python -m fakes.node --ros-args ...``."""

import sys

from dsvt_ros.ros import detector_node
from fakes.machine import pretended_machine

if __name__ == "__main__":
    with pretended_machine():
        sys.exit(detector_node.main())
