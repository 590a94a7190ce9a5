from pathlib import Path

from setuptools import find_packages, setup

NAME = "dsvt_ros"


def files(folder: str, pattern: str = "*") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern) if path.is_file())


extras = {
    "torch": ["torch>=2.1"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.17", "onnxscript>=0.5"],  # exporting needs torch 2.6 or later
    "tensorrt": ["tensorrt>=8.5"],
    "triton": ["triton>=3.6"],
    "bags": ["rosbags>=0.10"],
    "argoverse": ["pyarrow>=12"],
    "plot": ["matplotlib>=3.5"],
    "test": ["pytest>=6.2", "hypothesis>=6"],  # colcon test looks for pytest here
    "dev": ["mypy", "ruff", "types-PyYAML"],
}

setup(
    name=NAME,
    version="0.1.0",
    description="Detects cars, pedestrians and cyclists in lidar point clouds with DSVT, as a ROS 2 node",
    author="The dsvt_ros authors",
    maintainer="The dsvt_ros authors",
    maintainer_email="maintainers@dsvt-ros.invalid",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={
        NAME: ["py.typed", "models/*/*.yaml", "models/*/*.safetensors", "models/*/*.md"],
        f"{NAME}.io": ["msg/*/*.msg"],
        f"{NAME}.ros": ["*.xml"],
    },
    # A robot's torch, TensorRT and ONNX Runtime are builds for its hardware; none of them is ever pulled in from here.
    install_requires=["numpy", "pyyaml", "rich", "safetensors"],
    extras_require=extras,
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/dsvt_ros"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", files("launch", "*.launch.py")),
        (f"share/{NAME}/config", files("config")),
        (f"lib/{NAME}", ["resource/scripts/dsvt_detector"]),
    ],
    entry_points={
        "console_scripts": [
            "dsvt = dsvt_ros.tools.cli:main",
            "dsvt-detector = dsvt_ros.ros.detector_node:main",
        ],
    },
    zip_safe=False,
)
