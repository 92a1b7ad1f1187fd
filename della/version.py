"""The version of della: written once, read by the build and written into manifests."""

__version__ = "0.1.0"
