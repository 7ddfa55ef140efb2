"""What the methods cost, and whether they help: measured, with the results beside the code in ``results``."""
