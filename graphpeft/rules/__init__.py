"""The parts of a method: its config, and its rules, which add nodes to graphs."""
