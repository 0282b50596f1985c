"""What a layer is as a module: weights, operands, experts, caches, and fused layers taken apart."""
