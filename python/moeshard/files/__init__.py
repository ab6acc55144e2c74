"""Reading and writing small files: whole or not at all, and what is wrong in them is said with its place."""
