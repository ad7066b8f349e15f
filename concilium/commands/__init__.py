"""One module per command group; each has a `command`."""
