"""Whatever a file holds, reading it gives values or one clear line."""
