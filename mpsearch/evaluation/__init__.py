"""How well tables agree with what was measured."""
