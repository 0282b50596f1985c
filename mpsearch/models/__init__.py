"""How a model is seen and run."""
