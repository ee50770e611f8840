from helpers.fixtures import chat_tokenizer, llama, methods_of_transformers  # noqa: F401
