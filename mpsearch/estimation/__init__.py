"""What estimators are made of."""
