"""What every other package may use: errors, writing files, the folder of a run, sampling settings. It imports nothing of the project."""
