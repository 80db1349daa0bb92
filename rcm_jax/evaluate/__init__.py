"""How good samples are: statistics in numpy float64, a small classifier for the features, tables, pictures, a report."""
