"""ciuic_runtime."""
