"""``wmpo compare``: methods trained on equal budgets and tested on the same start states."""
