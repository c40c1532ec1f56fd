"""The format of checkpoints: tensors as safetensors, everything else as JSON, a checksum for each file."""
