"""From a name or a link to a file, and from a model to the hub."""
