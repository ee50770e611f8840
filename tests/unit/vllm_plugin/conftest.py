from helpers.serving.fixtures import adapter, log, model, options, other, server  # noqa: F401
