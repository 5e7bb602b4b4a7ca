"""World models: what the next frames look like, given the last ones and the robot's actions.

``flow`` says how noise becomes frames, ``stdit`` and ``conv`` are the networks that do it, ``autoencoder``
maps frames to what a network works on, and ``imagination`` strings chunks together into episodes.
Import the modules by name: this one stays empty so that ``import wmpo_gym.world`` does not load torch.
"""
