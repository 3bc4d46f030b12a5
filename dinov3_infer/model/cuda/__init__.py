"""The forward pass for NVIDIA GPUs: a copy of the weights in 16 bits, one kernel between products, CUDA graphs."""
