"""Starts the detector, and RViz on request.

ros2 launch dsvt_ros detector.launch.py input_topic:=/velodyne_points rviz:=true
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

CONFIG = Path(get_package_share_directory("dsvt_ros")) / "config"

# Topics as they stand in detector.rviz.
RVIZ_CLOUD = "/lidar/points"
RVIZ_MARKERS = "/dsvt_detector/output/markers"

ARGUMENTS = {
    "params_file": (str(CONFIG / "detector.yaml"), "parameters of the node"),
    "input_topic": (RVIZ_CLOUD, "clouds to detect in (sensor_msgs/PointCloud2)"),
    "odometry_topic": (
        "~/input/odometry",
        "motion of the vehicle (nav_msgs/Odometry), which models of several sweeps need; without it they ask TF",
    ),
    "output_topic": ("~/output/detections", "where detections go (vision_msgs/Detection3DArray)"),
    "model": ("", "embedded model or model folder; empty: as in params_file"),
    "weights": ("", "weights file, .safetensors or .pth; empty: as in params_file"),
    "backend": ("", "who runs the networks, such as auto or torch; empty: as in params_file"),
    "device": ("", "auto, cpu, cuda or cuda:N; empty: as in params_file"),
    "namespace": ("", "namespace of the node"),
    "use_sim_time": ("false", "take the time from /clock, as for replayed bags"),
    "autostart": ("true", "configure and activate at once; false: wait for a lifecycle manager"),
    "build_only": ("false", "build the model's TensorRT engines into the cache, then end"),
    "log_level": ("info", "debug, info, warn, error or fatal"),
    "rviz": ("false", "show clouds and boxes in RViz (needs the package rviz2)"),
}
TRUTH_VALUES = {"rviz", "use_sim_time", "autostart", "build_only"}


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    parameters = {name: value[name] == "true" for name in ("use_sim_time", "autostart", "build_only")}
    for name in ("model", "weights", "backend", "device"):
        if value[name]:
            # Without the type launch would read a model folder named "2024" as a number.
            parameters[name] = ParameterValue(value[name], value_type=str)
    detector = Node(
        package="dsvt_ros",
        executable="dsvt_detector",
        name="dsvt_detector",
        namespace=value["namespace"],
        parameters=[value["params_file"], parameters],
        remappings=[
            ("~/input/pointcloud", value["input_topic"]),
            ("~/input/odometry", value["odometry_topic"]),
            ("~/output/detections", value["output_topic"]),
        ],
        ros_arguments=["--log-level", value["log_level"]],
        output="screen",
    )
    namespace = value["namespace"].strip("/")
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", str(CONFIG / "detector.rviz")],
        parameters=[{"use_sim_time": parameters["use_sim_time"]}],
        remappings=[
            (RVIZ_CLOUD, value["input_topic"]),
            (RVIZ_MARKERS, f"/{namespace}{RVIZ_MARKERS}" if namespace else RVIZ_MARKERS),
        ],
        condition=IfCondition(value["rviz"]),
    )
    return [detector, rviz]


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=description,
            choices=["true", "false"] if name in TRUTH_VALUES else None,
        )
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])
