"""A generator of short Chinese children's stories, and the facts about each story."""
