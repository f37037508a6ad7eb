"""Is this machine fit to train? What ``edgetune doctor`` says, line by line, each with what to do about it."""
