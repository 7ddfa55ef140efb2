"""Acting on a model: units and where they go, the class swap, the journal that undoes it, the pass."""
