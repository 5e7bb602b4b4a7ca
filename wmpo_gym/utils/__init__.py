"""Helpers without a domain: files, settings, progress bars and layers."""
