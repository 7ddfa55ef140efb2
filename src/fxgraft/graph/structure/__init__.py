"""Answers questions about a bare network: its sites, joins, stages, head and stem, and the meaning of dimensions."""
