"""One attached model: its record, and everything that changes it."""
