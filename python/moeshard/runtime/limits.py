"""The largest numbers that the engine takes. Imports nothing, so that a command line knows them before it loads it."""

MAX_INT32 = 2**31 - 1
MAX_SEED = 2**32 - 2
"""The engine takes the one above for "a random one"."""
# Of the models that run here most were trained on far more than fits; a longer text gets a longer context by itself.
DEFAULT_CTX = 4096
