from fastgen.nn.sequential import Sequential

__all__ = ["Sequential"]
