"""Damaged and hostile images and checkpoints, derived from whole ones by their structure, and their readers."""
