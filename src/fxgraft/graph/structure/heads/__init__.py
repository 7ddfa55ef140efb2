"""The two ends of a network: its stem, and its head with pooling, classifier, logits and probabilities."""
