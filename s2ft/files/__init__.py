"""Files: reading files that may be damaged or hostile, replacing files in one step, and the formats of adapters."""
