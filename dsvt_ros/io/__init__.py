"""Everything that becomes points: PointCloud2 layouts, point files and bags, without ROS."""
