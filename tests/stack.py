"""Moved to bench.stack."""
from bench.stack import Stack as Stack
