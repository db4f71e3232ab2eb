"""The chat page that the server has at its root: three files, which ask nothing of other hosts.
They use the public API only, as any other client does."""
