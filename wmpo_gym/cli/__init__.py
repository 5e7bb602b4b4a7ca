"""The ``wmpo`` command: one thin module per sub-command."""
