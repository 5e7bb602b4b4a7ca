"""``wmpo bench``: how fast the environments and the world model run."""
