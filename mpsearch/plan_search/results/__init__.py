"""What a search found: the result, its comparison and front, and the folder that keeps it."""
