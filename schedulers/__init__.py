"""What should run where, and when. Loads neither torch nor ray."""
