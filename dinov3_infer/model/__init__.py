"""The network: a vision transformer, and how it computes.  Nothing here knows a file or an image format."""
