"""The ROS 2 edge: the only place that imports rclpy and messages."""
