"""Where bytes are held while a model runs."""
