"""How good samples are. Statistics in numpy float64, classifier features, tables, pictures, reports."""
