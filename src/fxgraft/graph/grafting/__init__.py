"""Changing a model: units, their placements, the plan, the transaction that writes it, and the class swap."""
