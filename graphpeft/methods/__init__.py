"""The methods, one file each: a config and its rules."""
