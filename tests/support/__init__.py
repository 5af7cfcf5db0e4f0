"""What several test files need; no tests."""
