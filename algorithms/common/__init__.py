"""What the group algorithms share."""
