"""What Ray and torch do not promise to keep: every use of a private interface, in one file for each of the two."""
