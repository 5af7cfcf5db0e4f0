"""Runs the Python blocks and shell commands of README.md and docs/."""
