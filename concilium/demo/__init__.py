"""A federation on one machine: real processes, real sockets, real images."""
