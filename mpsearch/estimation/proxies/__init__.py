"""Proxies: formulas over weights, gradients and activations, and their evolution."""
