"""What in a model can be adapted, and how it is found."""
