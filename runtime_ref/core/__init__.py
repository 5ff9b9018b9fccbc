"""What every storey of the runtime talks in: programs of a step, batches, the KV cache, ranks."""
