from helpers.serving.fixtures import adapter, log, model, options, other, server, storage  # noqa: F401
from helpers.serving.resolving import config, reads, root, settled  # noqa: F401
