"""The paper's tables 3 to 5 on a data set of one's own: ``python -m reference.experiment table3``."""
