"""Adapting a trained network to another domain: the loop, its checkpoint, its streams, batch-norm statistics."""
