"""Observes the gates of Squeeze-and-Excitation, analyses them by class, draws and tabulates them."""
