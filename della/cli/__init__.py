"""The command: arguments, exit codes, progress; a thin layer over della.api."""
