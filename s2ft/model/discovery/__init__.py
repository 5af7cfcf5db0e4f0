"""Finds the couplings of a model of no known family."""
