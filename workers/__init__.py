"""The inspection loop, the engine, results, the trainer and the Serve replica around them."""
