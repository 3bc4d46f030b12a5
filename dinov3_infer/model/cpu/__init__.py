"""The forward pass on CPUs, with packed weights and compiled passes."""
