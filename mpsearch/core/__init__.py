"""What is passed around: layers, precisions, tables, budgets, plans, solutions. numpy alone; nothing here loads torch."""
