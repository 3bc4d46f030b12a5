"""Damaged and hostile pictures and checkpoints, made from whole ones by their structure, and what reads them."""
