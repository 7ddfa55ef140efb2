"""What other training libraries call: callbacks, trainers, launchers."""
