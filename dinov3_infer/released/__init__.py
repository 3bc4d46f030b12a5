"""The heads that the owners released with their backbones: classes, depth, segments, text."""
