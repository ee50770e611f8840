"""What the package knows about a base model and how its weights are held."""
