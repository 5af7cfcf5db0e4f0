"""Language models and their text: loading, data, prompts, token rows, generation and scoring.

Training, the server and the commands share these modules.
"""
