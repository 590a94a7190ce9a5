"""GPU kernels in Triton, private to the modules that launch them; importing one needs Triton."""
