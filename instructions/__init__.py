"""What an instruction requires of a story, whether a story meets it, and instruction data made from stories."""
