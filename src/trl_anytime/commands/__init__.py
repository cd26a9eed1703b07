"""The commands of `trl-anytime`, one file each. Each imports the libraries that it needs when it runs."""
