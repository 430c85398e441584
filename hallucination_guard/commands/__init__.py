"""The commands of the command line, one a file: what it takes, what it calls, what it prints."""
