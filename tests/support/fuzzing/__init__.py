"""Damaged and hostile images and checkpoints, made from whole ones by their structure, and what reads them."""
