"""The reference backend: runs a Program in PyTorch."""
