"""What outputs are compared by, and means with their standard errors."""
