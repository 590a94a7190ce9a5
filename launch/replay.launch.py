"""Plays a bag to the detector. Takes the arguments of detector.launch.py too.

ros2 launch dsvt_ros replay.launch.py bag:=/data/drive input_topic:=/velodyne_points rviz:=true
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

DETECTOR = Path(get_package_share_directory("dsvt_ros")) / "launch" / "detector.launch.py"


def play(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    value = {name: LaunchConfiguration(name).perform(context) for name in ("bag", "rate", "delay", "loop")}
    command = ["ros2", "bag", "play", value["bag"], "--clock", "--rate", value["rate"], "--delay", value["delay"]]
    return [ExecuteProcess(cmd=command + (["--loop"] if value["loop"] == "true" else []), output="screen")]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="bag folder or file"),
            DeclareLaunchArgument("rate", default_value="1.0", description="speed, as a multiple of the recorded one"),
            DeclareLaunchArgument("delay", default_value="5.0", description="wait for the model to load, s"),
            DeclareLaunchArgument(
                "loop", default_value="false", choices=["true", "false"], description="start again at the end"
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(DETECTOR)), launch_arguments={"use_sim_time": "true"}.items()
            ),
            OpaqueFunction(function=play),
        ]
    )
