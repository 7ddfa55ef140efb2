"""Acting on a model: units and where they go, the class swap, the plan and the transaction that writes it, the pass."""
