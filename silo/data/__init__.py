"""The institution's images as uint8 arrays (n, c, h, w), one file per format; no torch here."""
