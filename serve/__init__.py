"""A server of a run's checkpoints: a playground page and OpenAI's `/v1/completions`."""
