"""The look of results in every command: pictures, terminal, text. Knows nothing of their content."""
