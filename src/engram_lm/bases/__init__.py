"""Base models by name: what the name means, the weights, the tokenizer, and small models made from scratch."""
