"""What the hardware is, how fast it is, and how to use it."""
