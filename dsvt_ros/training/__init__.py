"""Lidar simulator, targets, losses and the recipe of the embedded models."""
