"""Bytes that nobody honest would send, for everything that decodes what strangers send."""
