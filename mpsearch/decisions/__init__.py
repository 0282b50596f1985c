"""What can be decided in a model: its layers, the groups that share a precision, and the options that a target refuses."""
