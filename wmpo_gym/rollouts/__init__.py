"""Run a policy: in the simulator, in a world model, and the protocol it is measured under."""
