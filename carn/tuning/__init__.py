"""Sweeps over settings of training: what is searched, what each trial is, what they came to."""
