"""Building sets of latents: one engine that can be ended and started again anywhere, and a source for each kind of
input. A new source is one file that makes a Source, and one line in the table of scripts/build_dataset.py."""
