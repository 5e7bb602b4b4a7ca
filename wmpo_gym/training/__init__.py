"""Training of any network: one trainer, on any device, alone or in several processes."""
