"""The training loop of the studies, until they run on `fxgraft.compare`."""
