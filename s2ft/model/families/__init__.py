"""Model families: the functions and the tables of names that list the couplings of a model type."""
