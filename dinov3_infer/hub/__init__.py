"""Locates and downloads weights, and publishes models on the hub."""
