"""The whole method as stages that can be stopped and taken up again: ``wmpo demo`` and ``wmpo reproduce``."""
