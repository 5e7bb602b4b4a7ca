"""Tasks of a robot arm on robosuite: the paper's, and whatever else is registered there."""
