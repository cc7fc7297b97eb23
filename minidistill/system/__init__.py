"""What a run needs of the operating system: files, subprocesses, HTTP, calls of other code."""
