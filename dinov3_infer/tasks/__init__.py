"""What people do with the features."""
