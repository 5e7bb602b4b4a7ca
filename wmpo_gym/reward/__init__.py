"""The success classifier: which frames of an episode show the instruction fulfilled.

``classifier`` holds the common part and the streaming state, ``conv`` and ``videomae`` the two networks,
``windows`` the clips to train on and the rule that turns probabilities into an outcome, ``calibration`` the
threshold, and ``training`` puts them together.
"""
