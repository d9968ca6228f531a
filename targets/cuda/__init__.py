"""CUDA engines: kernels compiled ahead of time, and which of them to use."""
