"""The largest numbers that the engine takes. Imports nothing, so that a command line knows them before it loads it."""

MAX_INT32 = 2**31 - 1
MAX_SEED = 2**32 - 2
"""The engine takes the one above for "a random one"."""
