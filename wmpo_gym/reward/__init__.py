"""The success classifier: the probability that a frame shows its instruction fulfilled.

``classifier`` is the base class with the streaming state, ``conv`` and ``videomae`` are the two networks,
``data`` holds the training clips and the rule from probabilities to an outcome, ``calibration`` the threshold
and ``training`` the training.
"""
