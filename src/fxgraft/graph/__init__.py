"""The graph layer: it reads and rewrites networks, and knows no method.

Four rooms, each of which knows only those before it: `dataflow`, `tracing`, `structure`, `grafting`.
"""
