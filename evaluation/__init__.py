"""Measures of trained models: validation loss, text measures, a sweep over checkpoints, averages of checkpoints."""
