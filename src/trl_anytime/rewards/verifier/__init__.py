"""When two mathematical answers are equal: reading, comparing, and the workers that do it."""
