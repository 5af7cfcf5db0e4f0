"""What ranks need to know of each other."""
