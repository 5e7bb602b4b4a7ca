"""Methods compared on identical environments, budgets and start states."""
