"""The version, a literal, so that the build reads it without importing the package (and with it torch)."""

__version__ = "0.1.0"
