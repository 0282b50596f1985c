"""Gradients, curvature, and the single pass that serves many estimators."""
