"""HTML: what Jupyter shows of tables, plans, fronts and results, and the report of a search as one page."""
