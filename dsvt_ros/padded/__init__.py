"""The stages of the detector in PyTorch's operations, on tensors of fixed capacity, so that the host never waits.

Only layer norms may be a kernel of their own, which PyTorch compiles (`norm`).
"""
