"""Measuring what patches cost: time, memory, and the report."""
