"""Calibration and evaluation texts: the embedded corpus, local files and hub data sets."""
