"""Does a method help on these images? Paired runs of a bare and a patched backbone, and an honest verdict."""
