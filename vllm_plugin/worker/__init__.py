"""The worker's side: prefixes on the device, and their copy into the paged KV cache."""
