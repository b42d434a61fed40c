"""What the code of a model reads, names and can reach, without running it."""
