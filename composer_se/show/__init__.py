"""Formats the results of all commands: pictures, tables on the terminal, text."""
