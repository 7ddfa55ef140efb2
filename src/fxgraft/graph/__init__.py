"""The graph layer: it reads and rewrites networks, and knows no method.

Five rooms: `dataflow` and `tracing`, then `runtime`, `structure` and `grafting`, each of which knows only those before
it. `names` and `atomic` serve all of them.
"""
