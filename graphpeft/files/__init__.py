"""Finds adapters' files in folders and on the Hub, checks untrusted content, and writes files atomically."""
