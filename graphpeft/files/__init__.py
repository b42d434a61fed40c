"""Adapters' files: found in folders and on the Hub, read with suspicion, written whole."""
