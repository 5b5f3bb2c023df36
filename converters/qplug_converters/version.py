"""The version of qplug, once."""

__version__ = "0.1.0"
