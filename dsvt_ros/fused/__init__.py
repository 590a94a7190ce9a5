"""The stages of the detector as few GPU kernels on tensors of fixed capacity, so that the host never waits."""
