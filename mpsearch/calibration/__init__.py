"""The prepared model, and the doors that use it: `profile`, `evaluate`, `measure_plans`."""
