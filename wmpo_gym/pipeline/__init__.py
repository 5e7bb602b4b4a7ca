"""The method as stages: collect, train the world and the reward, validate, optimise, test."""
