"""What every other package may use: errors, writing files, the folder of a run, sampling settings. It imports nothing of the project."""

from . import threads as threads  # sets the environment, so it must come before torch
