"""The graph-rewriting layer: tracing, sites, structure, rewriting and the class swap.

Nothing here knows a training method; `fxgraft.patches` builds methods out of these tools.
"""
