"""World models: video prediction conditioned on past frames and robot actions.

``flow`` implements rectified flow, ``networks.stdit`` and ``networks.conv`` the networks,
``networks.autoencoder`` maps frames to latents, and ``imagination`` samples trajectories chunk by chunk.
Import the modules directly: this package imports nothing, so that ``import wmpo_gym.world`` does not load
    torch.
"""
