"""What every other package may use: errors, safe writing of files, settings of sampling. It imports nothing of the project."""
