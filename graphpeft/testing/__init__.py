"""What property-tests adapters and rewrites: the laws, and strategies for models, inputs, configs and edits."""
