"""From a module to a graph that behaves the same."""
