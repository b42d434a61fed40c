"""Virtual tokens in front of a model's input."""
