"""The stages of the detector in plain torch, on tensors of fixed capacity, so that the host never waits."""
