"""What every method of the registry keeps to, on every backbone of the zoo."""
