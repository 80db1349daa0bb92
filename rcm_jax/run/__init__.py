"""A run from its config to what it leaves in a workdir: training, and sampling from what was trained."""
