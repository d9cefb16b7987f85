"""A declared grid of techniques and batch sizes, each trained for the same number of steps."""
