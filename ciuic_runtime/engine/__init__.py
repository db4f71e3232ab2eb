"""Requests, batches and sampling; carries a schedule out on local devices and records what happened."""
