"""Other libraries that change or run modules, a file for each: its traces on them, and the answers of adapted ones."""
