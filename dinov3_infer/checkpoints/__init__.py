"""A model in files: recognised, loaded, saved and exported."""
