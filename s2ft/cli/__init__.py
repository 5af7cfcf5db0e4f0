"""The `s2ft` command."""
