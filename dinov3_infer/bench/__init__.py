"""Contests of speed: `contest` is the method, `contestants` are the models and engines, as far as they are installed.

The one place where the package imports transformers, timm and other engines: when somebody asks how fast they are.
"""
