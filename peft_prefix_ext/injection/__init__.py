"""How a prefix gets into a forward pass: hooks on the decoder and on its attention modules."""
