"""The networks and how they compute.  This room knows no files and no image formats."""
