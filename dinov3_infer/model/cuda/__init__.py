"""The same forward pass for NVIDIA GPUs: 16-bit weights kept, one kernel between two products, CUDA graphs."""
