"""Looks like the package pcdet: its way to build a network and to hand tensors on, with our modules inside."""

__version__ = "0.6.0+fake"
