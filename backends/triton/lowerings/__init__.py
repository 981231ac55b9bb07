"""What goes to kernels: one file for each pattern of a graph, found by its ``LOWERING``."""
