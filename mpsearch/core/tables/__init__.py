"""What a cost table holds, and its files."""
