"""What the gates of a trained network do on held-out data: the analysis behind `composer-se gates`."""
