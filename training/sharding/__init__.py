"""Training state divided among ranks: FSDP2 and expert parallelism as transformers lays them out, with an MXFP4 all-gather."""
