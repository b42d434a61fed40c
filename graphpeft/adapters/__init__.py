"""Adapters on a model: their state, tensors, graphs, and what becomes of them."""
