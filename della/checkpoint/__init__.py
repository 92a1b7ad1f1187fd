"""Reading and writing checkpoints: safetensors files, folders of shards, models of the Hub."""
