"""Batches: read once, split, mixed, put back as they were."""
