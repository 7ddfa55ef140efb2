"""Bridges to other training libraries: callbacks, trainers, launchers."""
