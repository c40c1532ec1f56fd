"""Data sets of the gallery: found in a folder or in installed packages, fetched by `make data`."""
