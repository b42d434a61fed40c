"""Variants of LoRA, which adapt linear layers alone: a file for each."""
