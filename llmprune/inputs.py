def example_inputs(model): raise NotImplementedError
