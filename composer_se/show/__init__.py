"""How results look, in every command: pictures, terminal, text. Nothing here knows what the results are about."""
