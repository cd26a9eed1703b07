"""Read files, servers and text from outside through one validation, and show them escaped."""
