"""Images through the model: one, a stream, or a million."""
