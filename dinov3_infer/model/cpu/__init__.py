"""The same forward pass for CPUs, with packed weights and compiled passes."""
