"""One module per weight format on disk; each decodes the tensors that a weight `X` is stored as, by their local names."""
