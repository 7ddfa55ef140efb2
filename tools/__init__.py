"""What writes the generated files: the stub, the parts of the README."""
