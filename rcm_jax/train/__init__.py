"""Training: state in, state out."""
