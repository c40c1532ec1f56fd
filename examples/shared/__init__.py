"""What the examples of the gallery share."""
