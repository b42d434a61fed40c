"""How a method is written: its config, and its rules, which put nodes into graphs."""
