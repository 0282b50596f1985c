"""Models whose weights lie elsewhere, in shards or in accelerate's maps: loaded for a call, and run block by block."""
