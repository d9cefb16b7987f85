"""The models of the built-in workloads, with every attention backend behind one switch."""
