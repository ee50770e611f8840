"""The format on disk, shared by training and serving. Imports neither peft nor transformers nor vllm."""
