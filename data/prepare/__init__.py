"""From text files to token shards: reading, removing duplicates, splitting, tokenizing, and a report."""
