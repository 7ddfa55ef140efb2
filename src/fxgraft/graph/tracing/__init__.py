"""Traces: a module's forward as a graph, what its values look like, edits of it, and the way back to code."""
