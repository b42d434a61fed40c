"""Traces models and modules to graphs: `lift` traces one module, `trace` a whole model."""
