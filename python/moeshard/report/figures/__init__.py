"""Each picture of the report, from what it shows."""
