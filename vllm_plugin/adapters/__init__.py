"""Adapters as a server knows them: where they lie, what they hold, who may use them."""
