# What type checkers and editors see: the names that __init__.py imports when they are asked for.
from fxgraft.public import *  # noqa: F403

__version__: str
