"""A long context as a prefix: exactly (`compile`), so that no request tokenizes or prefills it again."""
