"""Turns models and modules into graphs: tracer, proxies, guards, and graph modules in place."""
