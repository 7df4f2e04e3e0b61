"""The local activation unit over ids: behaviours are read from the embedding tables inside the kernels."""
