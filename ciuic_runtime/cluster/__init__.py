"""The engine's stages as Ray actors: where they are, what they hand on, and what happens when one is lost."""
