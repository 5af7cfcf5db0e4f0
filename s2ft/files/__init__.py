"""Reading files that may be damaged or hostile, and replacing files in one step."""
