"""Equality of mathematical answers: reading, comparing, and the workers that do it."""
