"""Analyses a model's code without running it: the attributes it reads, its names, and the state it can reach."""
