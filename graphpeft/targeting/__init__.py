"""From what a config names to what it means in a model."""
