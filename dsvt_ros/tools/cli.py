"""The command ``dsvt``: finds the command's module, runs it and turns our errors into one line."""

from __future__ import annotations

import importlib
import sys

from dsvt_ros import __version__
from dsvt_ros.errors import DsvtError
from dsvt_ros.host_threads import spin_briefly

# Command to what it does; each is a module of this package with `main(argv) -> exit status`.
COMMANDS = {
    "demo": "Detect objects in a simulated drive, through ROS where it exists",
    "detect": "Detect objects in point files and bags",
    "export": "Write a model folder with ONNX files",
    "build": "Build TensorRT engines, or plan their sizes from clouds",
    "verify": "Compare the backends with torch in single precision",
    "evaluate": "Average precision on labelled data",
    "benchmark": "Time every stage of a model on clouds",
    "train": "Train the embedded model on simulated scans",
}

USAGE = f"""usage: dsvt COMMAND [options]

{chr(10).join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())}

dsvt COMMAND --help lists a command's options; dsvt --version prints the version."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; console script ``dsvt``.

    Returns:
        0 if all went well, 1 for an error that was explained, 2 for a wrong command line, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        print(f"dsvt_ros {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"dsvt: no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    spin_briefly()
    module = importlib.import_module(f"dsvt_ros.tools.{command}")
    try:
        status: int = module.main(rest)
    except DsvtError as error:
        print(f"dsvt {command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output (head, say) has left
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(f"dsvt {command}: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
