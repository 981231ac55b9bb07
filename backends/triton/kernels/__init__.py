"""One GPU kernel a file, each with its reference and its work estimate."""
