"""The command line: ``fxgraft demo | compare | sites | suggest | info | bench | merge | show``."""
