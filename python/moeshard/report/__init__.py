"""Reports: one page that a person can read, with its figures as PNG and their numbers as CSV beside it."""
