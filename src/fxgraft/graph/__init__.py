"""The graph layer: it reads and rewrites networks, and knows no method.

Three rooms, each of which knows only those before it: `tracing`, `structure`, `grafting`.
"""
