"""Reads checkpoints: recognises, loads, saves and exports a model."""
