"""What nodes lose on text that nothing was chosen by."""
