"""Plans as TensorRT engines: native layers where it has them, plugins where it has nothing."""
