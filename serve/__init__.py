"""A server for the checkpoints of a run: a page to try them, and OpenAI's `/v1/completions`."""
