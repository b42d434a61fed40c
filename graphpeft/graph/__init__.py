"""Graphs of modules: templates, the operations in them, and the modules that run them."""
