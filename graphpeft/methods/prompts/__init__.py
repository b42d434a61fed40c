"""Virtual tokens in front of what a model reads."""
