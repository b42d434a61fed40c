"""The first values of A and B: from the weight, from a sample of the model's inputs, or random."""
