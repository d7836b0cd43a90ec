"""What every other package may use: errors and safe writing of files. It imports nothing of the project."""
