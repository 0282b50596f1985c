"""The search: tables propose, measurement decides."""
