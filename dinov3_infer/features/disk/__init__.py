"""What `embed` writes to disk and `Store` reads."""
