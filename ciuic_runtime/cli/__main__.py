"""`python -m ciuic_runtime.cli`."""

from ciuic_runtime.cli import main

main()
