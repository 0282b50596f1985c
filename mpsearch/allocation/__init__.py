"""From a table and a budget to a plan: `solve`, `pareto`, and the price of ties. Nothing here loads torch."""
