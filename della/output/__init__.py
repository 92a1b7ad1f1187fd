"""The way to the disk: OUT is absent, old or new."""
