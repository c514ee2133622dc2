"""What the gates of Squeeze-and-Excitation do: observed in a network, analysed per class, drawn and tabulated."""
