"""``wmpo estimate``: memory and computation of a run before anything is loaded."""
