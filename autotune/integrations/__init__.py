"""A strategy in a training with a loop of its own. Of transformers, Lightning and Accelerate none is imported."""
