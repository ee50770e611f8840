from helpers.serving.fixtures import adapter, log, model, options, other, server, storage  # noqa: F401
