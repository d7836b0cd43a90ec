"""What every other package may use: errors, safe writing of files, settings of sampling. It imports nothing of the project."""

from . import threads as threads  # sets the environment, so it must come before torch
