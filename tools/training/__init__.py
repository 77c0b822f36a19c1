"""Work that both stages of training share."""
