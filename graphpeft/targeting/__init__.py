"""Resolves the names in a config to sites of a model."""
