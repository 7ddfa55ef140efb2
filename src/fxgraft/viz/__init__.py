"""Pictures: of what methods do with images."""
