"""The method's maths: weights of samples, log-probabilities, losses."""
