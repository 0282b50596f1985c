"""Pictures and pages. Nothing below imports it; `mpsearch.core.shown` looks it up."""
