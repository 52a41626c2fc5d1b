"""Requests over a connection that stays open, so that what is being said can be interrupted."""
