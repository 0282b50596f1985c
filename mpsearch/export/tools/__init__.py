"""One file for each tool that a plan is written for."""
