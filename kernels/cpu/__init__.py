"""The ops on a CPU: in C++ where the library was built, and in vectorised torch."""
