"""Files that may be damaged or hostile, files replaced in one step, safetensors files, and the folder of an adapter."""
