"""The stages of the detector in PyTorch's operations, on tensors of fixed capacity, so that the host never waits."""
