"""Both ends of a network: its stem, and its head: pooling, classifier, logits and probabilities."""
