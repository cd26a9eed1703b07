"""Files, servers and text from outside: read through one validation, shown escaped."""
