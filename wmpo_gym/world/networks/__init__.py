"""The networks of a world: convolutional, STDiT, and the autoencoders."""
