"""The Triton backend: compressed layers as GPU kernels."""
