"""Files that are written whole or not at all, sets of them, and content that is checked with its place."""
