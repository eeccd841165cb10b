"""Talking to a checkpoint: answers as they are written, in a terminal, through a server, on a page."""
