"""All hand-written kernels: `cpu` for a C compiler, `gpu` for Triton.  They take tensors and know no models.

Importing this package imports neither of them.
"""
