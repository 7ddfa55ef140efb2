"""The command line: ``fxgraft demo | sites | info | bench | merge | show``."""
