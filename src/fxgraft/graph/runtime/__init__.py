"""A pass while it runs: its labels, what its grafts share, which output it made, and who records it."""
