"""Adapters' files of other libraries: recognised, read as PEFT's files, and written."""
