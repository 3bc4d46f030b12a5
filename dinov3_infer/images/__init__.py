"""From anything that holds an image to normalised pixels."""
