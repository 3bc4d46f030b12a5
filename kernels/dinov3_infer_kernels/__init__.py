"""All hand-written kernels: `cpu` for a C compiler, `gpu` for Triton.  They know tensors, and nothing of models.

Importing this package imports neither.
"""
