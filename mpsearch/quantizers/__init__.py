"""Number formats, and the quantizers that round, calibrate and transform weights and inputs."""
