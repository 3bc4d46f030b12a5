"""Reading images: sources, decoders, and the transform to normalised pixels."""
