"""The server: an API like OpenAI's for a base model and its adapters."""
