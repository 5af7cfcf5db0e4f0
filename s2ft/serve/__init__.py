"""One base and many adapters behind an HTTP API like OpenAI's."""
