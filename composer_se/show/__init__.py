"""The look of results in every command: pictures, terminal, text. Nothing here knows what they are about."""
