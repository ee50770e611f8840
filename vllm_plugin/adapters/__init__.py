"""The adapters of an engine: how they are read, checked, named and registered."""
