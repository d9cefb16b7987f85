"""Training data: where it comes from, how it is tokenized, and which samples form a batch."""
